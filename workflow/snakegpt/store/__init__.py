"""Objects named by their sha256, actions named by their key, and the readable links that point at them."""

from snakegpt.store.objects import Store

__all__ = ["Store"]
