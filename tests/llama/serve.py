"""llama.cpp's own server on a free loopback port, until standard input ends.

Told as JSON on the command line: `model`, the file; `key`, what it wants to be called with. It
prints its address when it listens.
"""

import json
import sys

import xllamacpp

told = json.loads(sys.argv[1])
params = xllamacpp.CommonParams()
params.model.path = told["model"]
params.api_keys = [told["key"]]
params.n_ctx = 1024
params.n_batch = params.n_ubatch = 512
params.n_parallel = 4
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.warmup = False
params.embedding = True
params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()
