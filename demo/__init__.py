# SPDX-License-Identifier: Apache-2.0
"""The demonstration behind `make demo`: a real redis under load is saved, killed and brought back.

::

    command     the `checkpoint` command with a service, store and socket of its own
    resp        the little of redis' protocol that is needed
    server      the program that is saved: redis-server, or one of ours when there is none
    clients     writers that log what was acknowledged and when
    proof       what the clients' log says must, and must not, be in a generation
"""
