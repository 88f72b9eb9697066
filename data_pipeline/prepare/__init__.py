"""Turning data as people have it into webdataset shards: `python -m data_pipeline.prepare`."""

from data_pipeline.prepare.demo_corpus import prepare_demo

__all__ = ["prepare_demo"]
