"""Turning data as people have it into webdataset shards: `python -m data_pipeline.prepare`."""
