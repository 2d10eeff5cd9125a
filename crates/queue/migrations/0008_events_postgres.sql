-- Its numbers come without waiting for anybody's commit, and whoever saw a commit gets a higher one.
CREATE SEQUENCE event_places;
-- Its rows live for moments, thousands of them a second: dead ones are swept by count, not by share.
ALTER TABLE event_outbox SET (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000,
    autovacuum_vacuum_insert_threshold = -1);
