-- KEYS: stock, buyers, stream   ARGV: user, order, sku
if redis.call('SISMEMBER', KEYS[2], ARGV[1]) == 1 then return 'again' end
if tonumber(redis.call('GET', KEYS[1]) or '0') < 1 then return 'sold out' end
redis.call('DECR', KEYS[1])
redis.call('SADD', KEYS[2], ARGV[1])
redis.call('XADD', KEYS[3], '*', 'order', ARGV[2], 'user', ARGV[1], 'sku', ARGV[3])
return 'queued'
