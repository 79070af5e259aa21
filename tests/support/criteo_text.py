"""Small Criteo logs and what the tests of preprocessing share."""

import random
from pathlib import Path

from papilio.data_pipeline.preprocess.preprocess_options import PreprocessOptions


def criteo_lines(num_rows: int, seed: int = 0) -> list[bytes]:
    generator = random.Random(seed)

    def integer(i: int) -> str:
        draw = generator.random()
        if draw < 0.2:
            return ""
        if draw < 0.3:
            return str(-generator.randint(1, 3))
        return str(int(generator.lognormvariate(2, 2 + i / 4)) % 10 ** generator.randint(1, 11))

    def hexadecimal(c: int) -> str:
        if generator.random() < 0.1:
            return ""
        key = int(2 ** (generator.random() * (2 + c % 10)))
        return f"{key * 2654435761 % 2**32:0{generator.choice([8, 8, 8, 1])}x}"

    return [
        "\t".join(
            [str(generator.randint(0, 1)), *(integer(i) for i in range(13)), *(hexadecimal(c) for c in range(26))]
        ).encode()
        for _ in range(num_rows)
    ]


def splitmix64(number: int) -> int:
    mask = 2**64 - 1
    number = (number + 0x9E3779B97F4A7C15) & mask
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & mask
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & mask
    return number ^ (number >> 31)


def criteo_options(inputs: list[Path] | Path, output: Path, **changes) -> PreprocessOptions:
    paths = inputs if isinstance(inputs, list) else [inputs]
    options = {"num_workers": 1, "show_progress": False} | changes
    return PreprocessOptions(source="criteo", inputs=tuple(map(str, paths)), output=str(output), **options)


def all_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
