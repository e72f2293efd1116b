"""config.json read by a family's table: values under our names, and for every key what became of it."""

from __future__ import annotations

from collections.abc import Mapping

from qconvert.errors import InputError, UnsupportedError
from qconvert.families import REQUIRED, Family
from qconvert.graph import Attr

ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "relu": "relu", "gelu": "gelu", "gelu_python": "gelu",
    "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_python_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}  # fmt: skip


FLT_MAX = 3.4e38  # runtimes keep these as f32


def _reasons(**keys: str) -> dict[str, str]:
    return {key: reason.replace("_", " ") for reason, text in keys.items() for key in text.split()}


# Keys of transformers' configuration classes (4.x and 5.23) and of fine-tuning tools that change no logits.
HARMLESS: Mapping[str, str] = _reasons(
    for_training_only="initializer_range attention_dropout hidden_dropout activation_dropout dropout "
    "classifier_dropout attn_pdrop resid_pdrop embd_pdrop summary_first_dropout gradient_checkpointing "
    "router_aux_loss_coef router_jitter_noise",
    says_which_program_wrote_it="transformers_version _name_or_path name_or_path _commit_hash unsloth_version "
    "unsloth_fixed unsloth_tiled_mlp",
    every_tensor_carries_its_own="torch_dtype dtype use_bfloat16",
    chooses_an_implementation="attn_implementation _attn_implementation _attn_implementation_autoset "
    "_attn_implementation_internal _experts_implementation _experts_implementation_internal _flash_attn_2_enabled "
    "torchscript use_cache cache_implementation tf_legacy_loss chunk_size_feed_forward",
    chooses_what_else_is_returned="return_dict output_hidden_states output_attentions output_router_logits "
    "tie_last_hidden_states",
    for_the_tokenizer="bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id unk_token_id mask_token_id "
    "decoder_start_token_id prefix tokenizer_class model_max_length max_sequence_length",
    for_other_tasks="id2label label2id num_labels problem_type finetuning_task task_specific_params summary_type "
    "summary_use_proj summary_activation summary_proj_to_labels is_decoder",
    for_generation="max_length max_new_tokens min_length do_sample early_stopping num_beams temperature top_k top_p "
    "typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids "
    "num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id "
    "remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens epsilon_cutoff "
    "eta_cutoff encoder_repetition_penalty num_assistant_tokens num_assistant_tokens_schedule "
    "assistant_confidence_threshold assistant_lookbehind target_lookbehind num_beam_groups diversity_penalty",
    a_copy_of_n_positions="n_ctx",
)

# Keys that are understood at these values only; null is always one of them. Families add their own.
NEUTRAL: Mapping[str, tuple[Attr, ...]] = {
    "pretraining_tp": (1,),
    "is_encoder_decoder": (False,),
    "tie_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": ({},),
    "per_layer_config": ({},),
    "quantization_config": ({},),
    "partial_rotary_factor": (1,),
    "use_sliding_window": (False,),
}


class Reader:
    """config.json by our names; remembers which keys were used."""

    def __init__(self, family: Family, config: Mapping[str, object], where: str) -> None:
        self.family, self.config, self.where = family, config, where
        self.used: set[str] = {"architectures", "model_type"} & config.keys()

    def value(self, name: str) -> object:
        """The setting `name`, its default where config.json has none, None where the family has none."""
        if name not in self.family.config:
            return None
        spellings, default = self.family.config[name]
        found = [k for k in spellings if k in self.config]
        self.used |= set(found)
        for other in found[1:]:
            if self.config[other] != self.config[found[0]]:
                raise self.wrong(other, f"the same as {found[0]} = {self.config[found[0]]!r}")
        if not found and default is REQUIRED:
            raise InputError(f"{self.where}: has no {spellings[0]}", hint="is the file complete?")
        return self.config[found[0]] if found else default

    def key(self, name: str) -> str:
        spellings = self.family.config[name].spellings
        return next((k for k in spellings if k in self.config), spellings[0])

    def wrong(self, key: str, wanted: str) -> InputError:
        return InputError(f"{self.where}: {key} = {self.config[key]!r}; {wanted} was wanted")

    def count(self, name: str, otherwise: int | None = None) -> int:
        """A positive whole number; `otherwise` where it is null or the family does not have it."""
        value = self.value(name)
        if value is None and otherwise is not None:
            return otherwise
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 31:  # i32 in every runtime
            raise self.wrong(self.key(name), "a positive whole number")
        return value

    def index(self, name: str) -> int:
        value = self.value(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self.wrong(self.key(name), "a whole number")
        return value

    def number(self, name: str) -> float:
        return positive(self, self.value(name), self.key(name))

    def optional(self, name: str) -> float | None:
        """A positive number; None where it is null or the family does not have it."""
        value = self.value(name)
        return None if value is None else positive(self, value, self.key(name))

    def flag(self, name: str) -> bool:
        value = self.value(name)
        if not isinstance(value, bool):
            raise self.wrong(self.key(name), "true or false")
        return value

    def activation(self) -> str:
        value = self.value("act")
        if not isinstance(value, str) or value not in ACTIVATIONS:
            message = f"{self.where}: {self.key('act')} = {value!r} is not supported"
            raise UnsupportedError(message, hint=f"there are {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[value]

    def rest(self) -> dict[str, str]:
        """Keys that were not used and why they need not be. An error for the first of which that is not known."""
        dropped = {}
        for k, value in self.config.items():
            if k not in self.used:
                dropped[k] = self._reason(k, value)
        return dropped

    def _reason(self, key: str, value: object) -> str:
        if value is None:
            return "null"
        harmless, neutral = {**HARMLESS, **self.family.harmless}, {**NEUTRAL, **self.family.neutral}
        if key in harmless and key not in self.family.neutral:
            return harmless[key]
        if key == "auto_map" and isinstance(value, dict) and not any("Model" in k for k in value):
            return "code is never run, and the model needs none"
        if key not in neutral:
            raise InputError(
                f"{self.where}: {key} = {str(value)[:80]} is a setting that {self.family.name} models do not have; "
                "it may change what this one computes",
                hint=f"if the model is a plain {self.family.name}, remove the key from config.json",
            )
        if value not in neutral[key]:
            raise UnsupportedError(
                f"{self.where}: {key} = {str(value)[:80]} is not supported for {self.family.name}",
                hint=f"{key} = {neutral[key][0] if neutral[key] else None} is",
            )
        return "has no effect at this value"


def positive(reader: Reader, value: object, key: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < FLT_MAX:
        raise InputError(f"{reader.where}: {key} = {value!r}; a positive number was wanted")
    return float(value)
