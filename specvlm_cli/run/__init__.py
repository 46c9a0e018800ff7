"""A run folder: its layout, its ledger, its Parquet files, and who may write there."""
