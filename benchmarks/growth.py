"""x"""


async def run(bench, keys):
    pass
