"""What the CUDA C++ kernels take of a GPU, from the machine code in dzkernels._cuda, where there need be no GPU: their
registers, and of dense_conv2d what bounds its speed by the instructions of its main loop. Refused: memory of a thread
beside its registers (spills), and another number of products than the convolution has. Needs cuobjdump, from the CUDA
toolkit or from Triton:

    python tests/ops/aot_cuda.py
"""

from __future__ import annotations

import dataclasses
import importlib.util
import pathlib
import re
import shutil
import subprocess


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel for one compute capability: its mangled name and its instructions without their operands."""

    name: str
    capability: int
    registers: int
    stack: int  # bytes
    instructions: tuple[str, ...]

    def count(self, mnemonic: str) -> int:
        return sum(text.startswith(mnemonic) for text in self.instructions)


@dataclasses.dataclass(frozen=True)
class Block:
    """ConvBlock of csrc/cuda/dense_conv2d.cuh: sizes of values and of a slice of channels in bytes, output channels."""

    size: int
    slice: int
    outs: int

    @classmethod
    def of(cls, kernel: Kernel) -> Block | None:
        found = re.search(r"ConvBlockI([tf])Li(\d+)ELi(\d+)E", kernel.name)
        return cls(2 if found[1] == "t" else 4, int(found[2]), int(found[3])) if found else None

    @property
    def rows(self) -> int:
        return 2 if self.outs * self.size > 64 else 4

    @property
    def warps(self) -> int:
        return 16 // self.rows

    @property
    def products(self) -> int:
        """Instructions of a warp for a slice: 9 taps, 32 bytes of channels, 16 pixels, 8 output channels each."""
        return 9 * (self.slice // 32) * self.rows * (self.outs // 8) * (3 if self.size == 4 else 1)

    @property
    def loads(self) -> int:
        return 9 * (self.slice // 32) * (self.rows + self.outs // 16)

    def tile(self, layer: Layer, limit: int) -> Tile | None:
        """plan() of csrc/cuda/dense_conv2d.cuh, for images of at most 64 pixels across."""
        side = layer.side // layer.stride
        rows = min(side, 256 // side)
        images = 256 // (side * rows)
        while True:
            height, width = ((length - 1) * layer.stride + 3 for length in (rows, side))
            patch = images * height * -(-width // layer.stride) * layer.stride
            shared = 256 * 8 + self.outs * (9 * layer.channels * self.size + 16) + 2 * patch * (self.slice + 16)
            if shared <= limit:
                return Tile(images * rows * side, shared)
            if images > 1:
                images = -(-images // 2)
            elif rows > 1:
                rows = -(-rows // 2)
            else:
                return None

    def busy(self, tile: Tile) -> int:
        """Warps that have pixels; each of a multiprocessor's four tensor cores works for its own."""
        return -(-tile.pixels // (16 * self.rows))


@dataclasses.dataclass(frozen=True)
class Tile:
    """Output pixels of a tile, and the shared memory of a block in bytes."""

    pixels: int
    shared: int


@dataclasses.dataclass(frozen=True)
class Layer:
    """A convolution of ResNet-20."""

    channels: int
    outs: int
    stride: int
    side: int  # of the input


@dataclasses.dataclass(frozen=True)
class Card:
    """By NVIDIA's data sheet, of one multiprocessor."""

    name: str
    capability: int
    flops: int  # of bfloat16 products a clock; tf32 has half
    traffic: float  # bytes of memory a clock
    shared: int  # bytes in all; a block takes 1 KiB more than it asks for
    limit: int  # bytes of a block


LAYERS = [Layer(16, 16, 1, 32), Layer(16, 32, 2, 32), Layer(32, 32, 1, 16), Layer(32, 64, 2, 16), Layer(64, 64, 1, 8)]
CARDS = [
    Card("A100", 80, 2048, 2039e9 / (108 * 1.41e9), 164 << 10, 163 << 10),
    Card("H100", 90, 4096, 3350e9 / (132 * 1.83e9), 228 << 10, 227 << 10),
]


def parsed(usage: str, code: str) -> list[Kernel]:
    """From what cuobjdump prints of resources and of machine code."""
    taken: dict[tuple[int, str], tuple[int, int]] = {}
    for part in re.split(r"^arch = sm_", usage, flags=re.M)[1:]:
        for name, registers, stack in re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+)", part):
            taken[int(part[:2]), name] = int(registers), int(stack)
    found = []
    for part in re.split(r"^\s*code for sm_", code, flags=re.M)[1:]:
        for function in re.split(r"^\s*Function : ", part, flags=re.M)[1:]:
            name = function.split()[0]
            text = re.findall(r"/\*[0-9a-f]{4,}\*/ +(?:@!?U?P\w+ +)?([A-Z][\w.]*)", function)
            found.append(Kernel(name, int(part[:2]), *taken[int(part[:2]), name], tuple(text)))
    return found


def problems(kernels: list[Kernel]) -> list[str]:
    refused = []
    for kernel in kernels:
        what = f"{kernel.name} for {kernel.capability / 10}"
        if kernel.stack > 0:
            refused.append(f"{what} keeps {kernel.stack} bytes outside registers")
        if (block := Block.of(kernel)) is None:
            continue
        for mnemonic, wanted in (("HMMA", block.products), ("LDSM", block.loads)):
            if kernel.count(mnemonic) != wanted:
                refused.append(f"{what} has {kernel.count(mnemonic)} {mnemonic}, not {wanted}")
    return refused


def main_loop(kernel: Kernel) -> int:
    """Instructions from the first product to the last one, loads before the first added."""
    products = [i for i, text in enumerate(kernel.instructions) if text.startswith("HMMA")]
    inner = kernel.instructions[products[0] : products[-1] + 1]
    return len(inner) + kernel.count("LDSM") - sum(text.startswith("LDSM") for text in inner)


def bounds(card: Card, kernel: Kernel, block: Block, layer: Layer, tile: Tile) -> dict[str, float]:
    """Clocks of a multiprocessor for 256 output pixels, did nothing else take time."""
    slices, groups = layer.channels * block.size // block.slice, layer.outs // block.outs
    busy = block.busy(tile)
    calls = slices * groups * busy * 256 / tile.pixels
    moved = 256 * (groups * layer.channels * layer.stride**2 + layer.outs) * block.size
    return {
        # 2 * 16 * 8 * 16 operations at the rate of bfloat16, or 2 * 16 * 8 * 8 at half of it
        "tensor cores": calls * block.products * 4096 / card.flops * 4 / min(busy, 4),
        "shared memory": calls * block.loads * 512 / 128,
        "issue": calls * main_loop(kernel) / 4,
        "memory": moved / card.traffic,
    }


def main() -> None:
    spec = importlib.util.find_spec("dzkernels._cuda")
    if spec is None or spec.origin is None:
        raise SystemExit("dzkernels was built without CUDA")
    kernels = parsed(*(tool(option, spec.origin) for option in ("--dump-resource-usage", "--dump-sass")))
    print(f"{'kernel':52}{'sm':>4}{'registers':>10}{'stack':>6}{'HMMA':>6}{'LDSM':>6}{'main loop':>10}")
    for kernel in kernels:
        name = kernel.name.removeprefix("_ZN2dz")
        row = f"{name.lstrip('0123456789')[:50]:52}{kernel.capability:4}{kernel.registers:10}{kernel.stack:6}"
        if Block.of(kernel):
            row += f"{kernel.count('HMMA'):6}{kernel.count('LDSM'):6}{main_loop(kernel):10}"
        print(row)
    print()
    titles = ["GPU", "dtype", "layer", "tile", "shared, KiB", "blocks", "tensor cores", "shared memory", "issue"]
    for cells in ([*titles, "memory", "of peak"], ["---"] * 11):
        print(f"| {' | '.join(cells)} |")
    for card in (card for card in CARDS if any(kernel.capability == card.capability for kernel in kernels)):
        for size in (2, 4):
            for layer in LAYERS:
                print(prediction(card, size, layer, kernels))
    if refused := problems(kernels):
        raise SystemExit("\n".join(refused))


def prediction(card: Card, size: int, layer: Layer, kernels: list[Kernel]) -> str:
    """A row of the table: the block that with_block() chooses, its clocks, and the part that tensor cores are busy."""
    found = []
    for kernel in kernels:
        block = Block.of(kernel)
        if block is None or (kernel.capability, block.size) != (card.capability, size) or layer.outs % block.outs:
            continue
        tile = block.tile(layer, card.limit)
        if tile is not None and block.slice == min(64, layer.channels * size):
            found.append((tile.pixels * block.outs * min(block.busy(tile), 4), block.outs, kernel, block, tile))
    _, _, kernel, block, tile = max(found, key=lambda choice: choice[:2])
    clocks = bounds(card, kernel, block, layer, tile)
    registers = -(-kernel.registers // 8) * 8 * 32 * block.warps
    resident = min(card.shared // (tile.shared + 1024), 65536 // registers)
    cells = [card.name, "bfloat16" if size == 2 else "float32"]
    cells.append(f"{layer.channels} to {layer.outs}, {layer.side}x{layer.side}{', stride 2' * (layer.stride - 1)}")
    cells += [f"{block.outs} x {tile.pixels}", f"{tile.shared / 1024:.1f}", str(resident)]
    cells += [f"{value:.0f}" for value in clocks.values()]
    cells.append(f"{100 * clocks['tensor cores'] / max(clocks.values()):.0f} %")
    return f"| {' | '.join(cells)} |"


def tool(*args: str) -> str:
    """What cuobjdump prints."""
    path = cuobjdump()
    if path is None:
        raise SystemExit("cuobjdump was not found: it is part of the CUDA toolkit, and of the package triton")
    return subprocess.run([path, *args], capture_output=True, text=True, check=True).stdout


def cuobjdump() -> str | None:
    """Its path."""
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        return shutil.which("cuobjdump")
    bundled = pathlib.Path(triton.origin).parent / "backends" / "nvidia" / "bin"
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=str(bundled))


if __name__ == "__main__":
    main()
