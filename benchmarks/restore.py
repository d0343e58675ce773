"""The memory that checkpoints of full size take to be restored onto many devices of one host.

    python -m benchmarks.restore --dir SCRATCH [--parts qwen2_5_vl transformer] [--devices 8]

Random weights at the released shapes in bfloat16 are written, converted and restored, all parts
in one process, each weight over all devices as in training. The two of the default take 45 GB of
disk and 24 GB of memory, most of which nothing else may use. Ends with 1 where the restoring
process took more than the sum of the shards and 2 GB.
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

from benchmarks.full_size import PARTS, flush, measured

LIMIT_MB = 2000  # above the shards


def restore(folders: list[str]) -> None:
    """In a process of its own: the parts onto all devices, and the bytes of their shards."""
    import jax

    from unipic_jax.convert import load
    from unipic_jax.core import mesh as meshes
    from unipic_jax.model import read_part

    mesh = meshes.make()
    with jax.set_mesh(mesh):
        trees = [load.read(read_part(Path(f)), mesh=mesh) for f in folders]
    arrays = jax.tree.leaves(trees)
    shards = [s.data.nbytes for a in arrays for s in a.addressable_shards]
    print(json.dumps({"devices": len(jax.devices()), "shards_mb": sum(shards) / 1e6,
                      "weights_mb": sum(a.nbytes for a in arrays) / 1e6}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True, metavar="SCRATCH",
                        help="a folder of its own is made in it, and removed at the end")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["qwen2_5_vl", "transformer"])
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--restore", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.restore:
        restore(args.restore)
        return 0
    folder = args.dir / "restore"
    if folder.exists():
        sys.exit(f"restore: {folder} exists already; remove it")
    try:
        for part in args.parts:
            release = folder / part
            measured("benchmarks.random_release", "--size", "full", "--to", str(release),
                     "--parts", part)
            measured("unipic_jax", "convert", "--from", str(release),
                     "--to", str(folder / "jax" / part))
            shutil.rmtree(release)
        flush(folder)
        os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={args.devices}"
        found = measured("benchmarks.restore", "--dir", str(folder), "--restore",
                         *(str(folder / "jax" / part / part) for part in args.parts))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    over = found["own_mb"] - found["shards_mb"]
    print(f"{' and '.join(args.parts)}: {found['weights_mb']:.0f} MB of weights, "
          f"{found['shards_mb']:.0f} MB of shards on {found['devices']} devices; "
          f"{found['own_mb']:.0f} MB of memory at the most, in {found['seconds']:.0f} s")
    print(f"{'ok  ' if over <= LIMIT_MB else 'FAIL'} memory above the shards, MB: {over:.0f} "
          f"(limit {LIMIT_MB})")
    return int(over > LIMIT_MB)


if __name__ == "__main__":
    sys.exit(main())
