"""Triton's interpreter before 3.9 makes an index of an array that holds one number; numpy 2.4 refuses that.

Called by tests/conftest.py and by scripts that tests start, before a kernel runs; it does nothing to newer
ones. Only kernels in the interpreter are concerned, so it is the tests' affair.
"""

from importlib import metadata


def numbers() -> None:
    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:
        return
    if tuple(int(number) for number in version.split(".")[:2]) >= (3, 9):
        return
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor, *more):
        patch(tensor, *more)
        more[-1].set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched
