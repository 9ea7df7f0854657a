"""Reads documents from local or remote files, tables and Hugging Face sets, cut into parts that can be read independently.

files     names of local or remote files, and limited streams of their bytes
records   texts of one part of a file: text, jsonl, parquet, csv, tsv
tars      samples of WebDataset tar files
sets      texts of a `datasets` set: on disk, from the Hub, or streamed
parts     a source -> parts, grouped by shard
child     reads parquet and sets in a child process, which a damaged file may crash
"""
