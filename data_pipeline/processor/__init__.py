"""Messages and pictures -> prompt and tiles: what training reads with and an exported model too.

The files are copied flat beside an exported model and loaded there with `trust_remote_code=True`:
they import the standard library, numpy, Pillow, torch, transformers and each other, nothing else
of this repository. Tiling, pictures and prompt need no torch and no transformers, so that an index
or a plan starts without them; for the same reason nothing is imported here.
"""
