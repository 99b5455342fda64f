"""Starts Python again on large pages of host memory, without which reading rows of a large table is slow."""

import os
import sys


def use_huge_pages() -> None:
    """Starts this process again with a C library that asks Linux for huge pages.

    A step allocates and touches some hundred MB anew, and reads rows all over gigabytes: both are slow on
    pages of 4 kB (docs/performance.md). The C library reads this setting only when a process starts.
    """
    name, setting = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
    settings = os.environ.get(name, "")
    if sys.platform == "linux" and sys.executable and setting not in settings:
        os.environ[name] = ":".join(filter(None, [settings, f"{setting}=1"]))
        os.execv(sys.executable, sys.orig_argv)
