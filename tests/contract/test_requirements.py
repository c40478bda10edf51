"""What the trainer's image must not have."""

from pathlib import Path

REQUIREMENTS = Path(__file__).parents[2] / "requirements"


def test_trap_38_nothing_of_the_image_downloads_kernels():
    # With `kernels` installed, transformers and bitsandbytes fetch code from the hub when a model is first used.
    pinned = (REQUIREMENTS / "trainer.txt").read_text().splitlines()
    assert any(line.startswith("bitsandbytes==") for line in pinned)
    assert not any(line.startswith("kernels==") for line in pinned)
