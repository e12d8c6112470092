"""Triton's interpreter with NumPy >= 2.4, which no longer turns one-element arrays into ints."""

from triton.runtime import interpreter


def mend() -> None:
    """Let loop bounds of interpreted kernels be one-element arrays, as they are."""
    original = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched
