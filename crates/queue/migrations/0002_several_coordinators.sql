-- What several coordinators on one database need.

-- `forgotten` rises when machines are forgotten, so that every coordinator drops them from its memory; the row of
-- `region` is the lock of those who set the regions.
INSERT INTO counters (name, value) VALUES ('forgotten', 0), ('region', 0);

-- Claimants look for the oldest waiting job: an index of the waiting ones alone stays small.
CREATE INDEX jobs_waiting ON jobs (created_at, id) WHERE status = 'QUEUED';
