"""The nano family's description: configs and tokenizers in the released layout, no weights.

    python configs/nano/make_model.py --to configs/nano/model

Every class and folder is the release's; the sizes are such that all parts together fit in 16 MB.
The tokenizers have each word of the blocks world as one token, and can spell everything else.
"""

import argparse
import json
import re
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

from unipic_jax.conditioning.metaquery import PREFIX
from unipic_jax.core import files, params
from unipic_jax.core.errors import InputError
from unipic_jax.data import blocks
from unipic_jax.model import CONFIG_FILES, read_part

GOLDENS = Path(__file__).parents[2] / "tests/goldens"  # has Qwen2.5-VL's chat template
SAMPLES = 1000  # of each task; in so many every word of the world occurs
TEXT_TOKENS = 24  # that CLIP and T5 take
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>",
                "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
QWEN_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+"
              r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")

# The 256 bytes as GPT-2 spells them; those that are printable as themselves come first.
_printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
_others = [b for b in range(256) if b not in _printable]
BYTES = [chr(b) for b in _printable] + [chr(256 + i) for i in range(len(_others))]
SPACE = BYTES[len(_printable) + _others.index(ord(" "))]


def texts() -> tuple[list[str], list[str]]:
    """(captions and instructions, questions and answers) of the world."""
    samples = {t: [blocks.sample(t, 0, i).example for i in range(SAMPLES)] for t in blocks.KINDS}
    drawn = [e.text for e in samples["generate"] + samples["edit"]]
    return drawn, [text for e in samples["describe"] for text in (e.text, e.answer)]


def words(lines: list[str]) -> list[str]:
    return sorted(set(re.findall(r"[A-Za-z]+", " ".join(lines))))


def merges(spelled: list[tuple[str, ...]]) -> list[tuple[str, str]]:
    """The merges of byte-pair encoding that make one token of each of these spelled words."""
    done = []
    while pairs := Counter(pair for word in spelled for pair in pairwise(word)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        done.append(best)
        spelled = [_merged(word, best) for word in spelled]
    return done


def _merged(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    out = []
    for symbol in word:
        if out and (out[-1], symbol) == pair:
            out[-1] += symbol
        else:
            out.append(symbol)
    return tuple(out)


def clip_tokenizer(folder: Path, lines: list[str], pad: str) -> int:
    """CLIP's files; the number of tokens."""
    spelled = [(*word[:-1], word[-1] + "</w>") for word in words(lines)]
    made = merges(spelled)
    tokens = [*BYTES, *(b + "</w>" for b in BYTES), *map("".join, made), BOS, EOS]
    vocab = {token: i for i, token in enumerate(tokens)}
    _json(folder / "vocab.json", vocab)
    _merges(folder, made)
    special = {"bos_token": BOS, "eos_token": EOS, "pad_token": pad, "unk_token": EOS}
    _json(folder / "special_tokens_map.json", special)
    _json(folder / "tokenizer_config.json", special | {
        "added_tokens_decoder": {
            str(vocab[t]): _added(t, normalized=t != "!") for t in dict.fromkeys((pad, BOS, EOS))},
        "clean_up_tokenization_spaces": False, "errors": "replace",
        "model_max_length": TEXT_TOKENS, "tokenizer_class": "CLIPTokenizer"})
    return len(tokens)


def t5_tokenizer(folder: Path, lines: list[str]) -> int:
    """T5's files; the number of tokens."""
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    letters = [chr(c) for c in range(33, 127)]
    pieces = [[t, 0.0] for t in special.values()]
    pieces += [["▁" + word, -2.0] for word in words(lines)]
    # A word of the world is likelier whole than in letters, which all others fall apart into.
    pieces += [["▁", -10.0], *([c, -10.0] for c in letters)]
    added = [_added(t) | {"id": i} for i, t in enumerate(special.values())]
    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    end = {"SpecialToken": {"id": "</s>", "type_id": 0}}
    first, second = ({"Sequence": {"id": s, "type_id": 0}} for s in "AB")
    _json(folder / "tokenizer.json", {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": None, "decoder": space, "pre_tokenizer": {
            "type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, space]},
        "post_processor": {
            "type": "TemplateProcessing", "single": [first, end],
            "pair": [first, end, second, end],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}}},
        "model": {"type": "Unigram", "unk_id": 2, "vocab": pieces, "byte_fallback": False}})
    _json(folder / "special_tokens_map.json", special)
    _json(folder / "tokenizer_config.json", special | {
        "added_tokens_decoder": {str(a.pop("id")): a for a in added},
        "clean_up_tokenization_spaces": False, "extra_ids": 0,
        "model_max_length": TEXT_TOKENS, "tokenizer_class": "T5Tokenizer"})
    return len(pieces)


def qwen_tokenizer(folder: Path, lines: list[str]) -> dict[str, int]:
    """Qwen2.5-VL's files; the ids of its special tokens, the last of which is the last token."""
    inside = words(lines)
    first = sorted({line.split()[0].capitalize().strip(".,?") for line in lines})
    spelled = sorted({*inside, *first, "user", "assistant", "system"})
    made = merges([tuple(word) for word in spelled] + [(SPACE, *word) for word in inside])
    vocab = {token: i for i, token in enumerate([*BYTES, *map("".join, made)])}
    special = {token: len(vocab) + i for i, token in enumerate(QWEN_SPECIAL)}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False,
                  "use_regex": False}
    _json(folder / "tokenizer.json", {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [_added(t) | {"id": i} for t, i in special.items()],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": QWEN_SPLIT}, "behavior": "Isolated",
             "invert": False}, byte_level]},
        "post_processor": byte_level, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None,
                  "continuing_subword_prefix": "", "end_of_word_suffix": "", "fuse_unk": False,
                  "byte_fallback": False, "ignore_merges": False, "vocab": vocab,
                  "merges": [" ".join(pair) for pair in made]}})
    _json(folder / "vocab.json", vocab)
    _merges(folder, made)
    _json(folder / "tokenizer_config.json", {
        "add_bos_token": False, "add_prefix_space": False,
        "added_tokens_decoder": {str(i): _added(t) for t, i in special.items()},
        "additional_special_tokens": list(QWEN_SPECIAL[1:]), "bos_token": None,
        "clean_up_tokenization_spaces": False, "eos_token": "<|im_end|>", "errors": "replace",
        "model_max_length": 131072, "pad_token": "<|endoftext|>",
        "split_special_tokens": False, "tokenizer_class": "Qwen2Tokenizer", "unk_token": None})
    template = (GOLDENS / "metaquery/qwen2_5_vl/chat_template.jinja").read_text(encoding="utf-8")
    _json(folder / "chat_template.json", {"chat_template": template})
    return special


def _added(token: str, normalized: bool = False) -> dict:
    return {"content": token, "lstrip": False, "normalized": normalized, "rstrip": False,
            "single_word": False, "special": True}


def _merges(folder: Path, made: list[tuple[str, str]]) -> None:
    lines = ["#version: 0.2", *map(" ".join, made)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def clip_config(vocab_size: int, act: str) -> dict:
    return {
        "architectures": ["CLIPTextModelWithProjection"], "attention_dropout": 0.0,
        "bos_token_id": 0, "dropout": 0.0, "eos_token_id": 2, "hidden_act": act,
        "hidden_size": 64, "initializer_factor": 1.0, "initializer_range": 0.02,
        "intermediate_size": 256, "layer_norm_eps": 1e-5,
        "max_position_embeddings": TEXT_TOKENS, "model_type": "clip_text_model",
        "num_attention_heads": 2, "num_hidden_layers": 2, "pad_token_id": 1,
        "projection_dim": 64, "torch_dtype": "bfloat16", "vocab_size": vocab_size}


def t5_config(vocab_size: int) -> dict:
    return {
        "architectures": ["T5EncoderModel"], "classifier_dropout": 0.0, "d_ff": 256, "d_kv": 32,
        "d_model": 128, "decoder_start_token_id": 0, "dense_act_fn": "gelu_new",
        "dropout_rate": 0.1, "eos_token_id": 1, "feed_forward_proj": "gated-gelu",
        "initializer_factor": 1.0, "is_encoder_decoder": True, "is_gated_act": True,
        "layer_norm_epsilon": 1e-6, "model_type": "t5", "num_decoder_layers": 2, "num_heads": 4,
        "num_layers": 2, "output_past": True, "pad_token_id": 0,
        "relative_attention_max_distance": 128, "relative_attention_num_buckets": 32,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
        "vocab_size": vocab_size}


def qwen_config(special: dict[str, int]) -> dict:
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "attention_dropout": 0.0,
        "bos_token_id": special["<|endoftext|>"], "eos_token_id": special["<|im_end|>"],
        "hidden_act": "silu", "hidden_size": 128, "image_token_id": special["<|image_pad|>"],
        "initializer_range": 0.02, "intermediate_size": 256, "max_position_embeddings": 4096,
        "max_window_layers": 6, "model_type": "qwen2_5_vl", "num_attention_heads": 4,
        "num_hidden_layers": 6, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
        "rope_scaling": {"mrope_section": [1, 2, 13], "type": "mrope"}, "rope_theta": 200.0,
        "sliding_window": 4096, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "use_cache": True, "use_sliding_window": False,
        "video_token_id": special["<|video_pad|>"],
        "vision_config": {
            "depth": 3, "fullatt_block_indexes": [1, 2], "hidden_act": "silu", "hidden_size": 64,
            "in_chans": 3, "intermediate_size": 128, "model_type": "qwen2_5_vl", "num_heads": 2,
            "out_hidden_size": 128, "patch_size": 7, "spatial_merge_size": 2,
            "spatial_patch_size": 7, "temporal_patch_size": 2, "tokens_per_second": 2,
            "window_size": 28},
        "vision_end_token_id": special["<|vision_end|>"],
        "vision_start_token_id": special["<|vision_start|>"],
        "vision_token_id": special["<|vision_pad|>"], "vocab_size": special["<|video_pad|>"] + 1}


LEVELS = 3
CONFIGS = {  # of what does not depend on a tokenizer, by file
    "kontext/transformer/config.json": {
        "_class_name": "SD3Transformer2DKontextModel", "_diffusers_version": "0.35.1",
        "attention_head_dim": 64, "caption_projection_dim": 128, "dual_attention_layers": [0, 1],
        "in_channels": 8, "joint_attention_dim": 128, "num_attention_heads": 2, "num_layers": 4,
        "out_channels": 8, "patch_size": 2, "pooled_projection_dim": 128, "pos_embed_max_size": 8,
        "qk_norm": "rms_norm", "sample_size": 12},
    "kontext/vae/config.json": {
        "_class_name": "AutoencoderKL", "_diffusers_version": "0.35.1", "act_fn": "silu",
        "block_out_channels": [16, 32, 32], "down_block_types": ["DownEncoderBlock2D"] * LEVELS,
        "force_upcast": True, "in_channels": 3, "latent_channels": 8, "latents_mean": None,
        "latents_std": None, "layers_per_block": 1, "mid_block_add_attention": True,
        "norm_num_groups": 4, "out_channels": 3, "sample_size": 48, "scaling_factor": 1.0,
        "shift_factor": 0.0, "up_block_types": ["UpDecoderBlock2D"] * LEVELS,
        "use_post_quant_conv": False, "use_quant_conv": False},
    "kontext/scheduler/scheduler_config.json": {
        "_class_name": "FlowMatchEulerDiscreteScheduler", "_diffusers_version": "0.35.1",
        "base_image_seq_len": 256, "base_shift": 0.5, "max_image_seq_len": 4096,
        "max_shift": 1.15, "num_train_timesteps": 1000, "shift": 6.0,
        "use_dynamic_shifting": False},
    "metaquery/conditioner/config.json": {
        "_class_name": "StableDiffusion3Conditioner", "_diffusers_version": "0.35.1",
        "connector_config": {"hidden_size": 128, "intermediate_size": 512,
                             "num_attention_heads": 2, "num_hidden_layers": 2},
        "joint_attention_dim": 128, "llm_hidden_size": 128, "num_queries": 32,
        "pooled_projection_dim": 128},
    "judge/config.json": {"_class_name": "EditJudge", "hidden_size": 128},
    # A picture of 48x48 is seen at 42x42: 6x6 patches, 3x3 tokens, one for each cell.
    "metaquery/qwen2_5_vl/preprocessor_config.json": {
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_processor_type": "Qwen2VLImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711], "max_pixels": 42 * 42,
        "merge_size": 2, "min_pixels": 42 * 42, "patch_size": 7, "temporal_patch_size": 2},
}


def make(target: Path) -> None:
    """All of it into the new folder `target`; InputError where that is not new."""
    drawn, asked = texts()
    with files.new_folder(target) as root:
        by_file = dict(CONFIGS)
        for name, pad, act in (("", EOS, "quick_gelu"), ("_2", "!", "gelu")):
            size = clip_tokenizer(_folder(root, f"kontext/tokenizer{name}"), drawn, pad)
            by_file[f"kontext/text_encoder{name}/config.json"] = clip_config(size, act)
        size = t5_tokenizer(_folder(root, "kontext/tokenizer_3"), drawn)
        by_file["kontext/text_encoder_3/config.json"] = t5_config(size)
        special = qwen_tokenizer(_folder(root, "metaquery/qwen2_5_vl"), [PREFIX, *drawn, *asked])
        by_file["metaquery/qwen2_5_vl/config.json"] = qwen_config(special)
        by_file["metaquery/qwen2_5_vl/generation_config.json"] = {
            "bos_token_id": special["<|endoftext|>"], "pad_token_id": special["<|endoftext|>"],
            "eos_token_id": [special["<|im_end|>"], special["<|endoftext|>"]]}
        for file, content in by_file.items():
            _json(_folder(root, str(Path(file).parent)) / Path(file).name, content)


def counts(root: Path) -> dict[str, int]:
    """The number of parameters of each part that has any, by folder."""
    found = [read_part(file.parent) for name in CONFIG_FILES for file in root.rglob(name)]
    return {str(part.folder.relative_to(root)): params.count(part.specs)
            for part in sorted(found, key=lambda part: part.folder) if part.has_weights}


def _folder(root: Path, name: str) -> Path:
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="a new folder")
    args = parser.parse_args()
    try:
        make(args.to)
    except InputError as e:
        sys.exit(f"make_model: {e}")
    for name, number in (found := counts(args.to)).items():
        print(f"{name:28}{number:>12,}")
    # MetaQuery has a transformer of its own.
    print(f"{'with two transformers':28}{sum(found.values()) + found['kontext/transformer']:>12,}")


if __name__ == "__main__":
    main()
