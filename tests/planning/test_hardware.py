"""flatgpt.planning.hardware: machines as a person writes them."""

import pytest

from flatgpt.planning.hardware import ACCELERATORS, find_accelerator, parse_machine


@pytest.mark.parametrize(("text", "nodes", "per_node", "name"), [
    ("8xH100", 1, 8, "H100"), ("2x8xH100", 2, 8, "H100"), ("H100", 1, 1, "H100"), ("1xRTX4090", 1, 1, "RTX 4090"),
    ("rtx 4090", 1, 1, "RTX 4090"), ("4xl40s", 1, 4, "L40S"), ("8xA100", 1, 8, "A100"), ("H100PCIe", 1, 1, "H100 PCIe"),
    ("8xA100-SXM4-40GB", 1, 8, "A100-SXM4-40GB"), ("cpu", 1, 1, "cpu"), ("2xcpu", 1, 2, "cpu"),
    (" 8XB200 ", 1, 8, "B200")])
def test_a_machine_is_nodes_times_gpus(text, nodes, per_node, name):
    machine = parse_machine(text)
    assert machine[:3] == (nodes, per_node, name)
    assert machine.world_size == nodes * per_node
    assert (machine.accelerator is None) == (name == "cpu")
    if machine.accelerator:
        assert machine.accelerator in ACCELERATORS.values()


@pytest.mark.parametrize("text", ["8xH900", "0xH100", "2x0xH100", "8x", "x", "2x2x2xH100", "-1xH100", "8 H100s", ""])
def test_what_is_no_machine_is_answered_with_the_list_of_cards(text):
    with pytest.raises(ValueError, match=r"write 8xH100, or 2x8xH100 for two nodes, with cpu or one of B200, .*4090"):
        parse_machine(text)


def test_a_card_of_40_gb_is_not_one_of_80():
    assert find_accelerator("NVIDIA A100-SXM4-40GB").memory_bytes == 40e9
    assert find_accelerator("NVIDIA A100-SXM4-80GB").memory_bytes == 80e9
