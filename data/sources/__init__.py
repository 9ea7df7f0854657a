"""Where documents come from: files here or elsewhere, tables, and Hugging Face sets, cut into parts that can be read alone.

files     names of files, local or remote, and bounded streams of their bytes
records   texts out of one part of a file: text, jsonl, parquet
sets      texts out of a `datasets` set, on disk, from the Hub, or streamed
parts     a source -> parts, grouped into the work of one shard each
"""
