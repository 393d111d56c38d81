"""Kernels for one platform each, with the semantics of `functional.attend`; chosen in `cached`."""
