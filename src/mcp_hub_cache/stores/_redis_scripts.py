"""What must look before it acts, as scripts of one key each (so that they hold on a cluster, too).

Those with a fence start by looking at the token. A key of another type answers a pcall with a table that holds an
error; its token is '', like that of a value too short to have one. So is that of a key that does not exist, which
is why '' asks again.
"""

from __future__ import annotations

from typing import Final

_LOOK: Final = """
local token = redis.pcall('GETRANGE', KEYS[1], 8, 15)
if type(token) == 'table' then
  if string.sub(token['err'], 1, 9) ~= 'WRONGTYPE' then return token end
  token = ''
end
if token ~= ARGV[1] or (token == '' and redis.call('EXISTS', KEYS[1]) == 0) then return 0 end
"""
WRITE: Final = f"""{_LOOK}
if ARGV[3] == '' then redis.call('SET', KEYS[1], ARGV[2]) else redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3]) end
return 1""".encode()
PATCH: Final = f"""{_LOOK}
if token == '' then return 0 end
redis.call('SETRANGE', KEYS[1], 0, ARGV[2])
if ARGV[3] == '' then redis.call('PERSIST', KEYS[1]) else redis.call('PEXPIRE', KEYS[1], ARGV[3]) end
return 1""".encode()
RENEW: Final = f"""{_LOOK}
if ARGV[2] == '' then
  redis.call('PERSIST', KEYS[1])
else
  local left = redis.call('PTTL', KEYS[1])
  if left >= 0 and left < tonumber(ARGV[2]) then redis.call('PEXPIRE', KEYS[1], ARGV[2]) end
end
return 1""".encode()
RELEASE: Final = f"""{_LOOK}
return redis.call('UNLINK', KEYS[1])""".encode()
# SET NX GET would do on Redis 7, but not on 6, and it fails on a key of another type.
BEGIN: Final = b"""
local found = redis.pcall('GET', KEYS[1])
if type(found) == 'table' then
  if string.sub(found['err'], 1, 9) ~= 'WRONGTYPE' then return found end
  return ''
end
if found then return found end
if ARGV[2] == '' then redis.call('SET', KEYS[1], ARGV[1]) else redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2]) end
return false"""
DELETE: Final = b"""
local head = redis.pcall('GETRANGE', KEYS[1], 0, 63)
if type(head) == 'table' then
  if string.sub(head['err'], 1, 9) ~= 'WRONGTYPE' then return head end
  head = ''
end
redis.call('UNLINK', KEYS[1])
return head"""
