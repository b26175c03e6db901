"""The keys of a ``config.json`` that no family uses in computation."""

from __future__ import annotations

from sa_jax.formats.reader import Fixed

INERT = frozenset(
  # Origin and loading.
  """
  _name_or_path _commit_hash _from_model_config architectures attn_implementation _attn_implementation
  _attn_implementation_autoset auto_map is_llama_config model_type torchscript transformers_version
  transformers.js_config unsloth_version unsloth_fixed use_bfloat16 use_flash_attention use_flash_attn flash_attention
  _flash_attn_2_enabled experts_implementation _experts_implementation output_router_logits
  """
  # Training only.
  """
  attention_dropout attn_dropout attn_pdrop attention_probs_dropout_prob classifier_dropout embd_pdrop
  embedding_dropout hidden_dropout hidden_dropout_prob initializer_range initializer_factor gradient_checkpointing
  neftune_noise_alpha pretraining_tp resid_pdrop residual_dropout use_cache z_loss_weight
  """
  # Tokenizer, and lengths that truncate nothing.
  """
  max_sequence_length model_max_length pad_token bos_token eos_token unk_token seq_length sep_token_id
  tokenizer_class tokenizer_model_max_length tokenizer_padding_side
  """
  # Heads and outputs that a language model does not have.
  """
  chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id finetuning_task id2label is_decoder
  label2id output_attentions output_hidden_states prefix problem_type return_dict task_specific_params tf_legacy_loss
  tie_encoder_decoder
  """
  # Settings of transformers' generate.
  """
  bad_words_ids begin_suppress_tokens cache_implementation diversity_penalty do_sample early_stopping
  encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty
  max_length max_new_tokens min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences
  output_scores remove_invalid_values repetition_penalty return_dict_in_generate suppress_tokens temperature top_k
  top_p typical_p
  """
  # Read by code other than transformers'; if a family uses one, that is read before this list applies.
  """
  attention_bias full_attn_mod interpolate_factor lm_head_bias
  max_window_layers mlp_bias mm_tokens_per_image use_mrope
  """
  # Ours.
  """
  shared_attention
  """.split()  # the strings above are one
)
"""Keys that do not affect our computation."""

FIXED: dict[str, Fixed] = {
  "is_encoder_decoder": Fixed((False,), "an encoder"),
  "add_cross_attention": Fixed((False,), "cross-attention"),
  "pruned_heads": Fixed(({},), "a model with pruned heads"),
  "rope_interleaved": Fixed((False,), "interleaved rotary embedding"),
  "use_bidirectional_attention": Fixed((False,), "bidirectional attention"),
}
"""Keys that affect every family's code."""
