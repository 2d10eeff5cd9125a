-- What the goal store outside of the database (etcd) has not been told yet: an app's newest goal, in the order of the
-- commits. A row is written in its goal's transaction and goes when the store has the goal, so there is at most one
-- an app, also where there is no such store.
CREATE TABLE goal_outbox (
    app TEXT NOT NULL PRIMARY KEY REFERENCES apps (name),
    seq BIGINT NOT NULL,
    -- Since when the store lacks a goal of this app, not only this one.
    waits_since BIGINT NOT NULL
);
CREATE UNIQUE INDEX goal_outbox_by_seq ON goal_outbox (seq);
INSERT INTO goal_outbox (app, seq, waits_since)
SELECT a.name, g.seq, g.created_at FROM apps a JOIN goals g ON g.seq = a.goal_seq;
