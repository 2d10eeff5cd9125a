-- Why a region is out of service, who said so and when: as of a worker.
ALTER TABLE regions ADD COLUMN drain_reason TEXT;
ALTER TABLE regions ADD COLUMN drained_by TEXT;
ALTER TABLE regions ADD COLUMN drained_at BIGINT;
-- Of those that are out of service already the audit log knows it.
UPDATE regions SET
    drained_by = (SELECT a.who FROM audit a WHERE a.what = 'region.drain' AND a.subject = regions.name ORDER BY a.id DESC LIMIT 1),
    drained_at = (SELECT a.at FROM audit a WHERE a.what = 'region.drain' AND a.subject = regions.name ORDER BY a.id DESC LIMIT 1)
WHERE drained = 1;
