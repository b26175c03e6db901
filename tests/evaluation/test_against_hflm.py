"""Requests of odd kinds, answered as lm-eval's own HFLM answers them on torch: stops, prefills, roles, unicode."""

import json

import pytest

import sa_jax
from sa_jax.train.data import byte_tokenizer

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'sa-jax[eval]'")
torch = pytest.importorskip("torch")
pytestmark = pytest.mark.filterwarnings("ignore")

import transformers  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

from sa_jax.evaluation.lm import SharedAttentionLM  # noqa: E402
from sa_jax.evaluation.settings import Limits  # noqa: E402

SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
NO_SYSTEM = (
  "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
  "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
  """One small model with random weights, as HFLM and as ours. It is asked to end texts by nothing but stops."""
  folder = tmp_path_factory.mktemp("hflm")
  backend = byte_tokenizer().backend
  backend.add_special_tokens(list(SPECIAL))
  backend.save(str(folder / "tokenizer.json"))
  names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
  (folder / "tokenizer_config.json").write_text(json.dumps(names | {"chat_template": NO_SYSTEM}))
  torch.manual_seed(3)
  theirs = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
      vocab_size=backend.get_vocab_size(),
      hidden_size=32,
      intermediate_size=48,
      num_hidden_layers=2,
      head_dim=8,
      num_attention_heads=4,
      num_key_value_heads=2,
      max_position_embeddings=128,
      bos_token_id=257,
      eos_token_id=258,
    )
  ).eval()
  with torch.no_grad():
    for name, parameter in theirs.named_parameters():
      parameter.normal_(mean=float("norm" in name), std=0.35)
  theirs.save_pretrained(folder)
  model, params = sa_jax.from_pretrained(folder, layout="layers")
  ours = SharedAttentionLM(model, params, sa_jax.load_tokenizer(folder), limits=Limits(slots=4))
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  return HFLM(pretrained=theirs, tokenizer=tokenizer, batch_size=1, max_length=128), ours


def answers(lm, kind: str, arguments) -> list:
  requests = [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]
  return getattr(lm, kind)(requests, disable_tqdm=True)


def greedy(pair, prompt: str) -> list[int]:
  """What the model goes on with, no stop heeded."""
  _, ours = pair
  tokens = [ours.tokenizer.encode(prompt)]
  out = sa_jax.generate(ours._model, ours._params, tokens, None, 16)
  return out.tokens[0, : out.lengths[0]].tolist()


def test_generation(pair):
  """Stops that are texts, special tokens, several, none; what changes nothing; prompts as people write them."""
  visible = pair[1].tokenizer.decode(greedy(pair, "The end"), special=True)
  few = {"until": [], "max_gen_toks": 12}
  requests = [
    ("The end", few),
    ("The end", {"until": [visible[3]], "max_gen_toks": 12}),
    ("The end", {"until": [visible[4:6], visible[8]], "max_gen_toks": 12}),
    ("The end", {"until": ["<|im_end|>"], "max_gen_toks": 16}),
    ("The end", {"until": "zzz", "max_gen_toks": 5}),
    ("The end", {"max_new_tokens": 7}),
    ("The end", few | {"num_beams": 1, "top_p": 0.3, "repetition_penalty": 1.0}),
    ("The end", few | {"do_sample": False, "temperature": 0.0, "min_p": None}),
    ("naïve café — 日本語 🙂", few),
    ("a\u2028b\x00\r\n", few),
    ("  spaces  ", few),
    ("<s>begun", few),
    ("x" * 300, few),
    ("<|im_start|>user\nhi<|im_end|>\n", few | {"until": ["\n\n"]}),
  ]
  assert answers(pair[1], "generate_until", requests) == answers(pair[0], "generate_until", requests)


def test_stops_that_are_special_tokens(pair):
  """Text up to them is kept, theirs is not: these weights write special tokens by themselves."""
  theirs, ours = pair
  requests = []
  for letter in "abcdefghijklmnopqrstuvwxyz":
    tokens = greedy(pair, letter * 3)
    if stops := [token for token in tokens[1:] if token > 258]:
      until = [ours.tokenizer.decode(stops[:1], special=True)]
      requests.append((letter * 3, {"until": until, "max_gen_toks": 16}))
  found = answers(ours, "generate_until", requests[:4])
  assert found == answers(theirs, "generate_until", requests[:4])
  free = answers(ours, "generate_until", [(prompt, {"until": [], "max_gen_toks": 16}) for prompt, _ in requests[:4]])
  assert any(len(cut) < len(whole) for cut, whole in zip(found, free, strict=True))


def test_log_likelihoods(pair):
  requests = [
    ("The cat", " sat"),
    ("The cat ", "sat"),
    ("The cat\n\n", "sat"),
    ("", "sat on"),
    ("", "<s>sat on"),
    ("naïve 日本", "語 🙂"),
    ("<s>The cat", " sat"),
    ("<|im_start|>user\n", "hi<|im_end|>"),
    ("x" * 200, " y" * 20),
    ("a", "\x00\u2028"),
  ]
  ours, theirs = (answers(lm, "loglikelihood", requests) for lm in reversed(pair))
  assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
  assert [value for value, _ in ours] == pytest.approx([value for value, _ in theirs], abs=1e-3, rel=1e-5)
  texts = [("naïve — 日本語 🙂" * 9,), ("x",), ("a\n\n b",)]
  rolling = [answers(lm, "loglikelihood_rolling", texts) for lm in pair]
  assert rolling[1] == pytest.approx(rolling[0], rel=1e-5)


def test_nothing_to_continue_with_is_certain(pair):
  """HFLM fails here; a task that has such an answer is scored all the same."""
  assert answers(pair[1], "loglikelihood", [("The cat", ""), ("", ""), ("a", "b")])[:2] == [(0.0, True)] * 2


USER = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
  ("messages", "prompt"),
  [
    ([USER], True),
    ([{"role": "system", "content": "Be brief."}, USER], True),
    ([USER, {"role": "assistant", "content": "The answer is"}], False),
    ([USER, {"role": "assistant", "content": "The answer is  "}], False),
    ([USER, {"role": "assistant", "content": " hi"}], False),
    ([USER, {"role": "assistant", "content": ""}], False),
    ([{"role": "system", "content": "x"}, USER, {"role": "assistant", "content": "hi "}], False),
  ],
  ids=["prompt", "system", "prefill", "spaces", "space before", "empty prefill", "system and prefill"],
)
def test_chats(pair, messages, prompt):
  ours, theirs = (lm.apply_chat_template(messages, add_generation_prompt=prompt) for lm in reversed(pair))
  assert ours == theirs
  assert answers(pair[1], "generate_until", [(ours, {"until": ["<|im_end|>"], "max_gen_toks": 6})]) == answers(
    pair[0], "generate_until", [(theirs, {"until": ["<|im_end|>"], "max_gen_toks": 6})]
  )


def test_a_template_that_fails_without_a_system_role_too(pair):
  with pytest.raises(sa_jax.UserError, match="has no attribute 'content'"):
    pair[1].apply_chat_template([{"role": "user"}])
