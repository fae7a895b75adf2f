"""The user's tables as a stock: list, check, import, install and remove them."""
