"""`stratum serve`: a model behind OpenAI's API.

    HTTP (app.py) --schema.py--> requests of the engine --worker.py--> pipe --engine_loop.py--> engine
                  <--answer.py-- events <----------------------------- pipe <------------------

One model, two processes: the engine runs in the main one, and asyncio serves the clients in the other.
"""
