"""A page that shows what the model will see: samples as packed, packs as planned, what is left out.

python -m data_pipeline.inspect CONFIG.yaml [key=value ...] --out report.html
"""
