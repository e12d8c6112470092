"""Triton's interpreter with NumPy >= 2.4, whose one-element arrays no longer convert to int."""

from triton.runtime import interpreter


def patch_interpreter() -> None:
    """Accept one-element arrays as loop bounds of interpreted kernels."""
    original = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched
