"""From files to examples: one module per kind of data.

The modules ``labels``, ``questions``, ``summaries``, ``boxes``, ``masks`` and ``speech`` are the kinds of
``jtl.data.load``: ``own`` reads your files and ``public`` a set of TensorFlow Datasets. The others read single formats.
"""
