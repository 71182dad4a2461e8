"""From files to examples: one module per kind of data.

In the modules of a kind that ``jtl.data.load`` takes, ``own`` reads your files and ``public`` a set of TensorFlow
Datasets.
"""
