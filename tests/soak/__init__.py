"""Hours of real load under random faults, with everything that the cache promises checked all along.

``python -m tests.soak --minutes 10 --seed 1`` runs it: some worker processes (``worker``), each with a cache on Valkey
behind a fault proxy with a standby folder, one in a folder that they share, and one in memory, under load (``load``).
The parent (``runner``) breaks the server, the network, the folders and the workers (``faults``), one after another and
sometimes two at once. What a worker reads is held against its own changes (``tests.ledger``); what it takes, in time
and in memory, against what was promised (``watch``). The first violation ends the run.
"""
