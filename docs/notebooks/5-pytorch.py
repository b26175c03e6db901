# %% [markdown]
# # 5. From PyTorch to JAX and back
#
# This notebook opens a transformers model in JAX, applies a plan, and exports it to PyTorch again. It uses a tiny Llama
# with random weights; a real model takes the same lines.
#
#     pip install 'sa-jax' torch transformers

# %%
import importlib.util
import pathlib
import sys
import tempfile

import jax.numpy as jnp
import numpy as np
import torch
import transformers

import sa_jax

work = pathlib.Path(tempfile.mkdtemp())
transformers.set_seed(0)
original = transformers.LlamaForCausalLM(
  transformers.LlamaConfig(
    vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=6,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, initializer_range=0.2,
  )
).eval()  # fmt: skip
original.save_pretrained(work / "original")
tokens = np.random.default_rng(0).integers(0, 128, (2, 24))
with torch.no_grad():
  expected = original(torch.tensor(tokens)).logits.numpy()

# %% [markdown]
# ## Into JAX
#
# The logits agree up to rounding:

# %%
model, params = sa_jax.from_pretrained(work / "original", dtype="float32")
logits = model.apply({"params": params}, jnp.asarray(tokens))
there = float(np.abs(logits - expected).max())
print(f"largest difference {there:.1e}, largest logit {np.abs(expected).max():.1f}")

# %% [markdown]
# ## And back
#
# `save` writes the model in memory, and `export` converts it to a Hugging Face folder. Nothing was trained here, so the
# exported weights equal the original ones.

# %%
sa_jax.save(work / "saved", model, params)
sa_jax.export(work / "saved", work / "back")
back = transformers.LlamaForCausalLM.from_pretrained(work / "back")
unchanged = all(torch.equal(one, other) for one, other in zip(original.parameters(), back.parameters(), strict=True))
print("bit for bit the same:", unchanged)

# %% [markdown]
# ## A shared model in PyTorch
#
# Under a plan, followers have no query and key projections. The exported folder includes its PyTorch code, in one
# readable file.

# %%
sa_jax.export(work / "original", work / "shared", plan="2:3-4")
sorted(each.name for each in (work / "shared").iterdir())

# %% [markdown]
# transformers runs such code with `trust_remote_code=True`. You can also import the file yourself:

# %%
spec = importlib.util.spec_from_file_location("modeling_shared_attention", work / "shared/modeling_shared_attention.py")
code = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = code
spec.loader.exec_module(code)
in_torch = code.SharedLlamaForCausalLM.from_pretrained(work / "shared").eval()
with torch.no_grad():
  from_torch = in_torch(torch.tensor(tokens)).logits.numpy()

# %%
shared, shared_params = sa_jax.from_pretrained(work / "shared", dtype="float32")
from_jax = shared.apply({"params": shared_params}, jnp.asarray(tokens))
apart = float(np.abs(from_jax - from_torch).max())
print(f"{shared.plan} in both, largest difference {apart:.1e}")

# %% [markdown]
# Models trained in JAX are exported in the same way, after `save`. [How to convert and export](../how-to/convert.md)
# lists the commands and the supported families.
