"""The model: what travels inside every checkpoint, so that it loads where this package is not installed.

Its files import only each other (`from .x_msa import y`), torch, transformers, safetensors, numpy, tqdm and pyarrow.
"""
