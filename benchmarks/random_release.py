"""A whole Kontext release with random weights, in the released layout, of any size.

    python -m benchmarks.random_release --size tiny --to /tmp/release
    python -m benchmarks.random_release --size full --to /tmp/release --parts transformer

`full` has exactly the released shapes (16.3 GB in bfloat16), `tiny` runs in a second. Names and
shapes come from the converter's tables; weights stream to disk, so no part has to fit in memory.
"""

import argparse
import json
import shutil
import string
import sys
import zlib
from pathlib import Path

import numpy as np
from tqdm import tqdm

from unipic_jax.convert import convert, names, torch_files
from unipic_jax.core import files
from unipic_jax.core.errors import InputError
from unipic_jax.model import Part, read_part
from unipic_jax.models import t5_encoder

NANO, JUDGE = (Path(__file__).parents[1] / "configs" / name for name in (
    "nano/model", "edit_judge/judge"))
PIECE = 2**22  # values that are drawn at a time
BOS, EOS, MAX_LENGTH = "<|startoftext|>", "<|endoftext|>", 77
ALPHABET = [c for c in string.printable if c == " " or not c.isspace()]


def configs(size: str, dtype: str) -> dict[str, dict]:
    """The config of each part by folder name; `full` is as released."""
    full = size == "full"

    def clip(width, layers, heads, act, projection):
        return {
            "architectures": ["CLIPTextModelWithProjection"], "attention_dropout": 0.0,
            "bos_token_id": 0, "dropout": 0.0, "eos_token_id": 2, "hidden_act": act,
            "hidden_size": width, "initializer_factor": 1.0, "initializer_range": 0.02,
            "intermediate_size": 4 * width, "layer_norm_eps": 1e-5,
            "max_position_embeddings": MAX_LENGTH, "model_type": "clip_text_model",
            "num_attention_heads": heads, "num_hidden_layers": layers, "pad_token_id": 1,
            "projection_dim": projection, "torch_dtype": dtype,
            "vocab_size": 49408 if full else 514}

    def pick(a, b):
        return a if full else b

    levels = 4
    return {
        "transformer": {
            "_class_name": "SD3Transformer2DKontextModel", "_diffusers_version": "0.35.1",
            "attention_head_dim": pick(64, 16), "caption_projection_dim": pick(1536, 64),
            "dual_attention_layers": list(range(pick(13, 2))), "in_channels": 16,
            "joint_attention_dim": pick(4096, 96), "num_attention_heads": pick(24, 4),
            "num_layers": pick(24, 4), "out_channels": 16, "patch_size": 2,
            "pooled_projection_dim": pick(2048, 40), "pos_embed_max_size": pick(384, 32),
            "qk_norm": "rms_norm", "sample_size": pick(128, 32)},
        "vae": {
            "_class_name": "AutoencoderKL", "_diffusers_version": "0.35.1", "act_fn": "silu",
            "block_out_channels": pick([128, 256, 512, 512], [16, 16, 24, 24]),
            "down_block_types": ["DownEncoderBlock2D"] * levels, "force_upcast": True,
            "in_channels": 3, "latent_channels": 16, "latents_mean": None, "latents_std": None,
            "layers_per_block": 2, "mid_block_add_attention": True,
            "norm_num_groups": pick(32, 8), "out_channels": 3, "sample_size": pick(1024, 256),
            "scaling_factor": 1.5305, "shift_factor": 0.0609,
            "up_block_types": ["UpDecoderBlock2D"] * levels, "use_post_quant_conv": False,
            "use_quant_conv": False},
        "scheduler": {
            "_class_name": "FlowMatchEulerDiscreteScheduler", "_diffusers_version": "0.35.1",
            "base_image_seq_len": 256, "base_shift": 0.5, "max_image_seq_len": 4096,
            "max_shift": 1.15, "num_train_timesteps": 1000, "shift": 3.0,
            "use_dynamic_shifting": False},
        "text_encoder": clip(*pick((768, 12, 12), (24, 3, 4)), "quick_gelu", pick(768, 16)),
        "text_encoder_2": clip(*pick((1280, 32, 20), (40, 3, 4)), "gelu", pick(1280, 24)),
        "text_encoder_3": {
            "architectures": ["T5EncoderModel"], "classifier_dropout": 0.0,
            "d_ff": pick(10240, 192), "d_kv": pick(64, 16), "d_model": pick(4096, 96),
            "decoder_start_token_id": 0, "dense_act_fn": "gelu_new", "dropout_rate": 0.1,
            "eos_token_id": 1, "feed_forward_proj": "gated-gelu", "initializer_factor": 1.0,
            "is_encoder_decoder": True, "is_gated_act": True, "layer_norm_epsilon": 1e-6,
            "model_type": "t5", "num_decoder_layers": pick(24, 3), "num_heads": pick(64, 4),
            "num_layers": pick(24, 3), "output_past": True, "pad_token_id": 0,
            "relative_attention_max_distance": 128, "relative_attention_num_buckets": 32,
            "tie_word_embeddings": False, "torch_dtype": dtype, "use_cache": True,
            "vocab_size": pick(32128, 128)},
        "qwen2_5_vl": {
            "architectures": ["Qwen2_5_VLForConditionalGeneration"], "attention_dropout": 0.0,
            "bos_token_id": 151643, "eos_token_id": 151645, "hidden_act": "silu",
            "hidden_size": pick(3584, 64), "image_token_id": 151655, "initializer_range": 0.02,
            "intermediate_size": pick(18944, 96), "max_position_embeddings": 128000,
            "max_window_layers": 28, "model_type": "qwen2_5_vl",
            "num_attention_heads": pick(28, 4), "num_hidden_layers": pick(28, 3),
            "num_key_value_heads": pick(4, 2), "rms_norm_eps": 1e-6,
            "rope_scaling": {"mrope_section": pick([16, 24, 24], [2, 3, 3]), "type": "mrope"},
            "rope_theta": 1e6, "sliding_window": 32768, "tie_word_embeddings": False,
            "torch_dtype": dtype, "use_cache": True, "use_sliding_window": False,
            "video_token_id": 151656, "vision_config": {
                "depth": pick(32, 4), "fullatt_block_indexes": pick([7, 15, 23, 31], [1, 3]),
                "hidden_act": "silu", "hidden_size": pick(1280, 32), "in_chans": 3,
                "intermediate_size": pick(3420, 64), "model_type": "qwen2_5_vl",
                "num_heads": pick(16, 2), "out_hidden_size": pick(3584, 64), "patch_size": 14,
                "spatial_merge_size": 2, "spatial_patch_size": 14, "temporal_patch_size": 2,
                "tokens_per_second": 2, "window_size": 112},
            "vision_end_token_id": 151653, "vision_start_token_id": 151652,
            "vision_token_id": 151654, "vocab_size": pick(152064, 564)},
    }


# Of Kontext; "qwen2_5_vl", the language model of MetaQuery without its tokenizer, on request.
PARTS = ("transformer", "vae", "scheduler", "text_encoder", "text_encoder_2", "text_encoder_3",
         "tokenizer", "tokenizer_2", "tokenizer_3")


CONDITIONER = {
    "_class_name": "StableDiffusion3Conditioner", "joint_attention_dim": 4096,
    "llm_hidden_size": 3584, "num_queries": 256, "pooled_projection_dim": 2048,
    "connector_config": {"hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 24,
                         "num_hidden_layers": 24}}


def without_weights(root: Path) -> Path:
    """The configs of the whole release in a new folder, with the nano family's tokenizers; enough
    for shapes and plans."""
    shutil.copytree(NANO, root, ignore=shutil.ignore_patterns("*.safetensors"))
    for name, raw in (configs("full", "bfloat16") | {"conditioner": CONDITIONER}).items():
        folder = root / ("kontext" if (root / "kontext" / name).is_dir() else "metaquery") / name
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        (folder / file).write_text(json.dumps(raw))
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):  # which take longer texts than nano's
        file = root / "kontext" / name / "tokenizer_config.json"
        length = 512 if name == "tokenizer_3" else MAX_LENGTH
        _json(file, json.loads(file.read_text()) | {"model_max_length": length})
    reads(root / "metaquery/qwen2_5_vl")
    # A judge is Qwen2.5-VL with a head beside it.
    shutil.copytree(root / "metaquery/qwen2_5_vl", root / "edit_judge")
    shutil.copytree(JUDGE, root / "edit_judge/judge")
    return root


def reads(folder: Path) -> None:
    """Give a language model's folder the nano family's tokenizer, and the released picture
    processor's sizes."""
    nano = NANO / "metaquery/qwen2_5_vl"
    shutil.copytree(nano, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(
        "*.safetensors", "*.index.json", "config.json"))
    ids = {k: v for k, v in json.loads((nano / "config.json").read_text()).items()
           if k.endswith("_token_id")}
    for file, change in (("config.json", ids), ("preprocessor_config.json", {
            "patch_size": 14, "min_pixels": 3136, "max_pixels": 12845056})):
        _json(folder / file, json.loads((folder / file).read_text()) | change)


def write(target: Path, size: str = "tiny", parts=PARTS, dtype: str = "bfloat16", seed: int = 0,
          progress: bool = True) -> None:
    """A release, or some parts of one, into the new folder `target`."""
    by_name = configs(size, dtype)
    with files.new_folder(target) as partial:
        for name in parts:
            folder = partial / name
            folder.mkdir()
            if name.startswith("tokenizer"):
                encoder = by_name[name.replace("tokenizer", "text_encoder")]
                _t5_tokenizer(folder) if name == "tokenizer_3" else _clip_tokenizer(
                    folder, encoder["vocab_size"], EOS if name == "tokenizer" else "!")
                continue
            file = "scheduler_config.json" if name == "scheduler" else "config.json"
            _json(folder / file, by_name[name])
            part = read_part(folder)
            if part.has_weights:
                write_weights(part, name, "BF16" if dtype == "bfloat16" else "F32", seed, progress)


def write_weights(part: Part, name: str, dtype: str, seed: int, progress: bool) -> None:
    """A part's weights of that type into its folder, in the files of its release."""
    rules = names.rules(part.module, part.config)
    shapes = convert.torch_shapes(part, rules)
    leaf = {n: r.path for r in rules for n in r.names}
    limit = 4e9 if name == "qwen2_5_vl" else None  # which gives five shards, as released
    layout = convert.default_layout(part, {n: (dtype, shapes[n]) for n in sorted(shapes)}, limit)
    total = sum(torch_files.nbytes(dtype, s) for s in shapes.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc=name, disable=not progress) as bar:
        for file, held in layout.files.items():
            writer = torch_files.Writer(part.folder / file, {n: (dtype, shapes[n]) for n in held},
                                        layout.metadata[file])
            for n in held:
                # A tensor's values depend on its name and the seed, not on what else is written.
                rng = np.random.default_rng([seed, zlib.crc32(f"{name}/{n}".encode())])
                array = _values(part, leaf[n], shapes[n], torch_files.DTYPES[dtype], rng)
                writer.write(n, array)
                bar.update(array.nbytes)
            writer.close()
    convert.write_index(part.folder, layout, shapes, part)


def _values(part: Part, path: tuple, shape: tuple, dtype, rng) -> np.ndarray:
    """Values that keep activations near one: unit gain in matrices, norms near one, small biases.

    Embeddings, of which a row is picked rather than rows summed, have unit values.
    """
    if path == ("positions",):
        return np.asarray(part.specs["positions"].init(None, shape, dtype))
    mean, std = 0.0, 1.0
    if path[-1] == "kernel":
        std = np.prod(shape[1:]) ** -0.5  # [out, in, ...]
        if part.module is t5_encoder and path[-2] == "q":
            std *= part.config.d_kv**-0.5  # T5 has no scale in its attention
    elif path[-1] == "scale":
        mean, std = 1.0, 0.1
    elif path[-1] == "bias":
        std = 0.05
    array = np.empty(shape, dtype)
    flat = array.reshape(-1)
    for i in range(0, flat.size, PIECE):
        piece = rng.standard_normal(min(PIECE, flat.size - i), np.float32)
        flat[i:i + PIECE] = piece * np.float32(std) + np.float32(mean)
    return array


def _json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _clip_tokenizer(folder: Path, vocab_size: int, pad: str) -> None:
    """Bytes as GPT-2 spells them, alone and at a word's end; the last two ids are the ends."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(len(rest))]
    vocab = {t: i for i, t in enumerate(letters + [f"{c}</w>" for c in letters])}
    # What merges would make; without merges no text reaches these.
    vocab |= {f"<|{i}|>": i for i in range(len(vocab), vocab_size - 2)}
    vocab |= {BOS: vocab_size - 2, EOS: vocab_size - 1}
    _json(folder / "vocab.json", vocab)
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    special = {"bos_token": BOS, "eos_token": EOS, "pad_token": pad, "unk_token": EOS}
    _json(folder / "special_tokens_map.json", special)
    _json(folder / "tokenizer_config.json", special | {
        "added_tokens_decoder": {
            str(vocab[t]): {"content": t, "lstrip": False, "normalized": t != "!",
                            "rstrip": False, "single_word": False, "special": True}
            for t in dict.fromkeys((pad, BOS, EOS))},
        "clean_up_tokenization_spaces": False, "errors": "replace",
        "model_max_length": MAX_LENGTH, "tokenizer_class": "CLIPTokenizer"})


def _t5_tokenizer(folder: Path) -> None:
    """One token a printable character, spaces as SentencePiece spells them."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    pieces = [(t, 0.0) for t in special.values()]
    pieces += [(c.replace(" ", "▁"), -float(i)) for i, c in enumerate(ALPHABET, 1)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in special.values()])
    tokenizer.save(str(folder / "tokenizer.json"))
    _json(folder / "special_tokens_map.json", special)
    _json(folder / "tokenizer_config.json", special | {
        "clean_up_tokenization_spaces": False, "extra_ids": 0, "model_max_length": 512,
        "tokenizer_class": "T5Tokenizer"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("tiny", "full"), default="tiny")
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--parts", nargs="+", choices=(*PARTS, "qwen2_5_vl"), default=PARTS,
                        metavar="PART",
                        help=f"which folders to write (all of {', '.join(PARTS)})")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        write(args.to, args.size, args.parts, args.dtype, args.seed)
    except InputError as e:
        sys.exit(f"random_release: {e}")


if __name__ == "__main__":
    main()
