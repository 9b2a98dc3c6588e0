"""What the CUDA kernels execute, counted by the machine: a table of launches.

    python -m tests.ptx [--shape NxCxHxW ...] [--dtype float32|bfloat16|float16|tf32]
                        [--channels-last] [--direction forward|backward]

Instructions are those of warps, in thousands and per image. Sectors are of 32 bytes, divided by as
many as hold the bytes that were touched; replays are those of shared memory by bank conflicts, of
its accesses without them. It is no model of time.
"""

import argparse

import torch

from mfef_ext import MFEFBlock
from tests.ptx import machine
from tests.ptx.cuda import Device, build

SHAPES = ["1x64x8x8", "1x128x8x8", "1x256x8x8", "1x512x2x2", "1x512x7x7", "1x256x14x14"]


def counted(device: Device, shape: list[int], dtype: str, layout, direction: str):
    """The launches of a block's forward or backward."""
    torch.manual_seed(0)
    tf32 = dtype == "tf32"
    torch.backends.cudnn.allow_tf32 = tf32
    element = torch.float32 if tf32 else getattr(torch, dtype)
    block = MFEFBlock(shape[1], groups="auto").to(element)
    x = torch.randn(shape).to(element).contiguous(memory_format=layout)
    attention = block.attention
    parameters = [attention.fc1_weight, attention.fc1_bias, attention.fc2_weight]
    parameters += [attention.fc2_bias, attention.spatial_weight]
    arguments = [list(block.conv.weights), block.conv.groups, True, *parameters]
    ops = torch.ops.mfef_ptx
    with torch.no_grad():
        out, *saved = ops.mfef_block(x, *arguments, True, tf32)
        if direction == "backward":
            device.launches()
            grad = torch.randn_like(out)
            ops.mfef_block_backward(grad, x, *arguments, *saved, True, True, tf32)
    return device.launches()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", nargs="+", default=SHAPES)
    choices = ["float32", "bfloat16", "float16", "tf32"]
    parser.add_argument("--dtype", nargs="+", default=choices[:2], choices=choices)
    parser.add_argument("--channels-last", action="store_true")
    directions = ["forward", "backward"]
    parser.add_argument("--direction", nargs="+", default=directions, choices=directions)
    options = parser.parse_args()
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    device = Device(build())
    device.set()
    device.count(True)
    classes = " | ".join(machine.CLASSES)
    print(f"| case | kernel | blocks x threads | all | {classes} | lanes | sectors | replays |")
    print("| --- " * (len(machine.CLASSES) + 7) + "|")
    for text in options.shape:
        shape = [int(size) for size in text.split("x")]
        for dtype in options.dtype:
            for direction in options.direction:
                for launch in counted(device, shape, dtype, layout, direction):
                    c, n = launch.counts, shape[0]
                    each = [f"{c[name] / n / 1e3:.1f}" for name in machine.CLASSES]
                    name = launch.kernel.split("kernel<mfef::cuda::")[-1].split(", ")[0]
                    shared = max(c["shared_passes"], 1)
                    row = [f"{text} {dtype} {direction}", name]
                    row += [f"{launch.blocks} x {launch.threads}"]
                    row += [f"{launch.instructions / n / 1e3:.1f}", *each]
                    row += [f"{c['lanes'] / launch.instructions:.1f}"]
                    row += [f"{c['sectors'] * 32 / max(c['unique'], 1):.2f}"]
                    row += [f"{c['shared_replays'] / shared:.0%}"]
                    print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
