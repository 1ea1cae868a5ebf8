"""Accelerators and the links between them, from their vendors' data sheets.

A device that is not listed has no peak, and so no MFU: "unknown" is better than a guess.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Accelerator(NamedTuple):
    flops: float  # a second, dense matrix products in bfloat16 (float16 on V100 and T4)
    memory_bytes: float
    memory_bytes_per_s: float
    link_bytes_per_s: float  # to the others of its node, one way: NVLink where it has that, else PCIe


# By a pattern that torch's name of the device holds as whole words; the first that fits counts.
ACCELERATORS = {
    "B200": Accelerator(2250e12, 180e9, 8.0e12, 900e9),
    "GH200": Accelerator(989e12, 96e9, 4.0e12, 450e9),
    "H200": Accelerator(989e12, 141e9, 4.8e12, 450e9),
    "H100 PCIe": Accelerator(756e12, 80e9, 2.0e12, 64e9),
    "H100 NVL": Accelerator(835e12, 94e9, 3.9e12, 300e9),
    "H100": Accelerator(989e12, 80e9, 3.35e12, 450e9),
    "A100-SXM4-40GB": Accelerator(312e12, 40e9, 1.555e12, 300e9),
    "A100": Accelerator(312e12, 80e9, 2.0e12, 300e9),
    "L40S": Accelerator(362e12, 48e9, 0.864e12, 32e9),
    "A10G": Accelerator(70e12, 24e9, 0.6e12, 32e9),
    "L4": Accelerator(121e12, 24e9, 0.3e12, 32e9),
    "V100": Accelerator(125e12, 32e9, 0.9e12, 150e9),
    "T4": Accelerator(65e12, 16e9, 0.32e12, 16e9),
    "RTX 4090(?! )": Accelerator(165e12, 24e9, 1.01e12, 32e9),
    "RTX 3090(?! )": Accelerator(71e12, 24e9, 0.936e12, 32e9),
}
CARDS = {key.partition("(")[0]: accelerator for key, accelerator in ACCELERATORS.items()}  # as a person calls them
# Between nodes, a GPU's share one way, where a node of eight has eight adapters of 400 Gbit/s, or one of 100.
NETWORKS = {"InfiniBand": 50e9, "Ethernet": 12.5e9 / 8}


class Machine(NamedTuple):
    """What a run is planned on: nodes with as many processes each, one a GPU; no accelerator is a CPU."""

    num_nodes: int
    per_node: int
    name: str
    accelerator: Accelerator | None

    @property
    def world_size(self) -> int:
        return self.num_nodes * self.per_node

    def __str__(self) -> str:
        nodes = f"{self.num_nodes} nodes of " if self.num_nodes > 1 else ""
        return f"{nodes}{self.per_node} x {self.name}"


def parse_machine(text: str) -> Machine:
    """8xH100 is a node of eight, 2x8xH100 two of them, H100 a single one, cpu a process on a CPU. Raises ValueError."""
    found = re.fullmatch(r"(?:(\d{1,6})x)?(?:(\d{1,6})x)?(\D.*)", text.strip(), re.IGNORECASE)
    first, second, name = found.groups() if found else (None, None, text)
    num_nodes, per_node = (int(first), int(second)) if second else (1, int(first or 1))
    plain = {re.sub(r"\W", "", card).lower(): card for card in CARDS}
    card = plain.get(re.sub(r"\W", "", name).lower())
    if num_nodes < 1 or per_node < 1 or (card is None and name.lower() != "cpu"):
        raise ValueError(f"gpus={text!r} is not known: write 8xH100, or 2x8xH100 for two nodes, with cpu or one of "
                         f"{', '.join(CARDS)}")
    return Machine(num_nodes, per_node, card or "cpu", CARDS.get(card))


def find_accelerator(name: str) -> Accelerator | None:
    """The accelerator that torch calls `name`; None for one that is not listed, and for a slice of one (MIG)."""
    return next((accelerator for key, accelerator in ACCELERATORS.items()
                 if re.search(rf"\b{key}(?!\w)(?!.*\bMIG\b)", name)), None)
