from bvit_jax.plan.topology import FAMILIES
from bvit_jax.runtime.chips import CHIPS, chip_named, chip_of


def test_the_names_of_jax_lead_to_the_chips() -> None:
    assert chip_of("TPU v5 lite") == chip_named("v5e")
    assert chip_of("TPU v5") == chip_named("v5p")
    assert chip_of("NVIDIA H100 80GB HBM3").bfloat16_flops == 989e12
    assert chip_of("cpu") is None
    assert chip_named("v1") is None


def test_the_table_is_consistent() -> None:
    kinds = [kind for chip in CHIPS for kind in chip.device_kinds]
    assert len(set(kinds)) == len(kinds)
    assert {chip.name for chip in CHIPS} >= FAMILIES.keys()
    for chip in CHIPS:
        assert 0.9 * chip.hbm_bytes < chip.usable_bytes <= chip.hbm_bytes
        assert chip.int8_ops >= chip.bfloat16_flops > 100 * chip.bandwidth
