"""Rewards of pictures: those that are traced into the step, and those that are asked for outside.

`traceable` has functions of pictures. `host` has the contract of all others: `builtin`, a server
(`http_client`), a vision judge (`judge`) and GenEval with a detector (`geneval`); `server` offers
any of them to others over HTTP.
"""
