"""The OpenAI-compatible endpoint, with the guard that holds every answer to the constitution.

Reading order: `guard` (what to do with an answer, pure), `gate` (asking the critic), `service` (one request
from prompt to answer), `app` (HTTP), `server` (life cycle). Nothing here needs torch or transformers.
"""
