"""What a GPU-hour costs, by product: the chart's values under `usage`, and the file of `qlora usage --prices`."""

from decimal import Decimal
from typing import Annotated, Final

from pydantic import Field

from qlora_api.base import ApiModel

ANY_PRODUCT: Final = "*"
"""Product of a price for all products that have none of their own."""
Price = Annotated[str, Field(pattern=r"^[0-9]{1,7}(\.[0-9]{1,6})?$", max_length=16)]
"""A decimal number, as text: binary fractions would make 2.30 into 2.2999999."""
Currency = Annotated[str, Field(pattern=r"^[A-Z]{3}$", max_length=3)]
"""Code of ISO 4217."""


class GpuPrices(ApiModel):
    """Prices of a GPU-hour."""

    currency: Currency = "USD"
    gpu_prices: dict[Annotated[str, Field(max_length=63)], Price] = Field(default_factory=dict)
    """By the product's name in the nodes' label."""

    def price_of(self, product: str | None) -> str | None:
        """Return the price of a GPU-hour; None if there is none."""
        return self.gpu_prices.get(product or ANY_PRODUCT, self.gpu_prices.get(ANY_PRODUCT))


NO_PRICES: Final = GpuPrices()


def cost_of(gpu_seconds: float, price: str) -> Decimal:
    """Return what GPU-seconds cost at a price per GPU-hour."""
    return Decimal(price) * Decimal(gpu_seconds) / 3600
