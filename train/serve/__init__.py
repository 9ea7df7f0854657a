"""`stratum serve`: a model behind OpenAI's API.

    HTTP (app.py) --schema.py, chat.py--> requests of the engine --worker.py--> engine thread --events--> answer.py --> JSON

One process, one model. asyncio serves the clients; the inference engine runs in a separate thread (`worker.py`).
"""
