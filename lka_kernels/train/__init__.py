"""Reference trainer: ``lka-train DATA``, or ``python -m lka_kernels.train DATA``.

``cli`` reads the options, ``run`` carries a run out; every other file is one part of it.
"""
