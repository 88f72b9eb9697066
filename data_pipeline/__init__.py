"""Raw data -> webdataset shards -> index -> plan -> packed batches."""
