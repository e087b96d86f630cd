CREATE FUNCTION mmalign_append_only() RETURNS trigger
    LANGUAGE plpgsql
    AS $$ BEGIN RAISE EXCEPTION 'votes and events are append only'; END $$;
CREATE TABLE annotator (
    id integer NOT NULL,
    name character varying(100) NOT NULL,
    folded character varying(200) NOT NULL,
    role character varying(12) NOT NULL,
    password text,
    active boolean NOT NULL,
    created_at double precision NOT NULL
);
CREATE SEQUENCE annotator_id_seq
    AS integer
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE annotator_id_seq OWNED BY annotator.id;
CREATE TABLE assignment (
    id character varying(32) NOT NULL,
    project integer NOT NULL,
    item bigint NOT NULL,
    annotator integer NOT NULL,
    kind character varying(12) NOT NULL,
    shown_order character varying(20) NOT NULL,
    state character varying(10) NOT NULL,
    holds boolean NOT NULL,
    number integer NOT NULL,
    vote_number integer,
    revision integer NOT NULL,
    repeats character varying(32),
    repeated boolean NOT NULL,
    guideline_version integer NOT NULL,
    leased_at double precision NOT NULL,
    expires_at double precision NOT NULL,
    displayed_at double precision
);
CREATE TABLE blob (
    media character varying(32) NOT NULL,
    data bytea NOT NULL
);
CREATE TABLE event (
    id bigint NOT NULL,
    at double precision NOT NULL,
    kind character varying(20) NOT NULL,
    project integer,
    annotator integer,
    assignment character varying(32),
    details text NOT NULL
);
CREATE SEQUENCE event_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE event_id_seq OWNED BY event.id;
CREATE TABLE guideline (
    project integer NOT NULL,
    version integer NOT NULL,
    text text NOT NULL,
    created_at double precision NOT NULL
);
CREATE TABLE item (
    id bigint NOT NULL,
    project integer NOT NULL,
    source integer NOT NULL,
    comparison text NOT NULL,
    content_hash character varying(64) NOT NULL,
    k integer NOT NULL,
    "row" text NOT NULL,
    role character varying(12) NOT NULL,
    answer text,
    explanation text,
    want integer NOT NULL,
    slots_left integer NOT NULL,
    priority double precision,
    "position" bigint NOT NULL,
    shuffle integer NOT NULL,
    freed bigint NOT NULL
);
CREATE SEQUENCE item_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE item_id_seq OWNED BY item.id;
CREATE TABLE media (
    key character varying(32) NOT NULL,
    project integer NOT NULL,
    sha256 character varying(64) NOT NULL,
    path text,
    mime character varying(40) NOT NULL,
    width integer NOT NULL,
    height integer NOT NULL,
    num_bytes bigint NOT NULL
);
CREATE TABLE participation (
    project integer NOT NULL,
    annotator integer NOT NULL,
    cursor bigint NOT NULL,
    freed_cursor bigint NOT NULL,
    num_taken integer NOT NULL,
    num_votes integer NOT NULL,
    num_skips integer NOT NULL,
    calibration_taken integer NOT NULL,
    calibration_done integer NOT NULL,
    calibration_right integer NOT NULL,
    reopened character varying(32),
    guideline_read integer,
    started_at double precision NOT NULL
);
CREATE TABLE project (
    id integer NOT NULL,
    name character varying(200) NOT NULL,
    kind character varying(10) NOT NULL,
    protocol text NOT NULL,
    guideline_version integer NOT NULL,
    is_open boolean NOT NULL,
    salt character varying(64) NOT NULL,
    batches integer NOT NULL,
    freed bigint NOT NULL,
    num_items integer NOT NULL,
    num_wanted integer NOT NULL,
    num_counted integer NOT NULL,
    created_at double precision NOT NULL
);
CREATE SEQUENCE project_id_seq
    AS integer
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE project_id_seq OWNED BY project.id;
CREATE TABLE schema_version (
    version integer NOT NULL,
    at double precision NOT NULL
);
CREATE SEQUENCE schema_version_version_seq
    AS integer
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE schema_version_version_seq OWNED BY schema_version.version;
CREATE TABLE session (
    token character varying(64) NOT NULL,
    annotator integer NOT NULL,
    created_at double precision NOT NULL,
    seen_at double precision NOT NULL,
    expires_at double precision NOT NULL
);
CREATE TABLE source (
    id integer NOT NULL,
    project integer NOT NULL,
    batch integer NOT NULL,
    description text NOT NULL,
    added_at double precision NOT NULL
);
CREATE SEQUENCE source_id_seq
    AS integer
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE source_id_seq OWNED BY source.id;
CREATE TABLE throttle (
    subject character varying(64) NOT NULL,
    failures integer NOT NULL,
    last_at double precision NOT NULL
);
CREATE TABLE vote (
    id bigint NOT NULL,
    assignment character varying(32) NOT NULL,
    revision integer NOT NULL,
    project integer NOT NULL,
    verdict text NOT NULL,
    shown text NOT NULL,
    late boolean NOT NULL,
    surplus boolean NOT NULL,
    dwell_ms integer,
    displayed_at double precision NOT NULL,
    submitted_at double precision NOT NULL,
    guideline_version integer NOT NULL,
    app_version character varying(40) NOT NULL
);
CREATE SEQUENCE vote_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE vote_id_seq OWNED BY vote.id;
ALTER TABLE ONLY annotator ALTER COLUMN id SET DEFAULT nextval('annotator_id_seq'::regclass);
ALTER TABLE ONLY event ALTER COLUMN id SET DEFAULT nextval('event_id_seq'::regclass);
ALTER TABLE ONLY item ALTER COLUMN id SET DEFAULT nextval('item_id_seq'::regclass);
ALTER TABLE ONLY project ALTER COLUMN id SET DEFAULT nextval('project_id_seq'::regclass);
ALTER TABLE ONLY schema_version ALTER COLUMN version SET DEFAULT nextval('schema_version_version_seq'::regclass);
ALTER TABLE ONLY source ALTER COLUMN id SET DEFAULT nextval('source_id_seq'::regclass);
ALTER TABLE ONLY vote ALTER COLUMN id SET DEFAULT nextval('vote_id_seq'::regclass);
INSERT INTO annotator VALUES (1, 'Ann', 'ann', 'admin', NULL, true, 1000);
INSERT INTO assignment VALUES ('_QSJugV59DYD6MV-fkw9Vw', 1, 2, 1, 'random', '[1, 0]', 'voted', true, 1, 1, 1, NULL, false, 1, 1000, 1900, 1000);
INSERT INTO assignment VALUES ('gDr6Q7_2Kqvni3tx6eMIYA', 1, 3, 1, 'random', '[0, 1]', 'voted', false, 2, 2, 1, NULL, false, 1, 1001, 1901, 1001);
INSERT INTO assignment VALUES ('4QfTCfW4ODtwnXpWhY6Qww', 1, 4, 1, 'random', '[1, 0]', 'voted', true, 3, 3, 2, NULL, false, 1, 1002, 1902, 1003);
INSERT INTO assignment VALUES ('etlm5smfdbt_M7kkUaVoLg', 1, 1, 1, 'active', '[0, 1]', 'leased', true, 4, NULL, 0, NULL, false, 1, 1003, 1904, NULL);
INSERT INTO event VALUES (1, 1000, 'guideline', 1, NULL, NULL, '{"of": "written", "version": 1}');
INSERT INTO event VALUES (2, 1000, 'project', 1, NULL, NULL, '{"of": "created"}');
INSERT INTO event VALUES (3, 1000, 'added', 1, NULL, NULL, '{"added": 4, "faults": 0, "role": "ordinary"}');
INSERT INTO event VALUES (4, 1000, 'account', NULL, 1, NULL, '{"of": "added", "role": "admin"}');
INSERT INTO event VALUES (5, 1000, 'leased', 1, 1, '_QSJugV59DYD6MV-fkw9Vw', '{"item": 2, "of": "random"}');
INSERT INTO event VALUES (6, 1000, 'displayed', 1, 1, '_QSJugV59DYD6MV-fkw9Vw', '{}');
INSERT INTO event VALUES (7, 1001, 'voted', 1, 1, '_QSJugV59DYD6MV-fkw9Vw', '{"late": false, "revision": 1}');
INSERT INTO event VALUES (8, 1001, 'leased', 1, 1, 'gDr6Q7_2Kqvni3tx6eMIYA', '{"item": 3, "of": "random"}');
INSERT INTO event VALUES (9, 1001, 'displayed', 1, 1, 'gDr6Q7_2Kqvni3tx6eMIYA', '{}');
INSERT INTO event VALUES (10, 1002, 'voted', 1, 1, 'gDr6Q7_2Kqvni3tx6eMIYA', '{"late": false, "revision": 1}');
INSERT INTO event VALUES (11, 1002, 'leased', 1, 1, '4QfTCfW4ODtwnXpWhY6Qww', '{"item": 4, "of": "random"}');
INSERT INTO event VALUES (12, 1002, 'prioritised', 1, NULL, NULL, '{"items": 4}');
INSERT INTO event VALUES (13, 1002, 'displayed', 1, 1, '4QfTCfW4ODtwnXpWhY6Qww', '{}');
INSERT INTO event VALUES (14, 1003, 'voted', 1, 1, '4QfTCfW4ODtwnXpWhY6Qww', '{"late": false, "revision": 1}');
INSERT INTO event VALUES (15, 1003, 'leased', 1, 1, 'etlm5smfdbt_M7kkUaVoLg', '{"item": 1, "of": "active"}');
INSERT INTO event VALUES (16, 1003, 'reopened', 1, 1, '4QfTCfW4ODtwnXpWhY6Qww', '{"revision": 1}');
INSERT INTO event VALUES (17, 1003, 'displayed', 1, 1, '4QfTCfW4ODtwnXpWhY6Qww', '{}');
INSERT INTO event VALUES (18, 1004, 'voted', 1, 1, '4QfTCfW4ODtwnXpWhY6Qww', '{"late": false, "revision": 2}');
INSERT INTO guideline VALUES (1, 1, '', 1000);
INSERT INTO item VALUES (2, 1, 1, 'row-1', '243e8f7d458f3b9fc10915157815ef4497ce9debc922e39906b9b226d91b54b4', 2, '{"id": "row-1", "prompt": {"text": "question 1", "images": [], "messages": [], "tools": null}, "candidates": [{"text": "1a", "images": [], "messages": [], "tools": null}, {"text": "1b", "images": [], "messages": [], "tools": null}], "scores": [], "ranks": null, "prob": null, "weight": null, "margin": null, "provenance": [], "prompts": null, "prefix": null, "extras": [], "where": ""}', 'ordinary', NULL, NULL, 1, 0, 1, 1720855822337, 39923392, 0);
INSERT INTO item VALUES (3, 1, 1, 'row-2', '85fc8b82419bfde5c4b8fe4452f5f76d9155dbd78fa68b488d72cd00a003391f', 2, '{"id": "row-2", "prompt": {"text": "question 2", "images": [], "messages": [], "tools": null}, "candidates": [{"text": "2a", "images": [], "messages": [], "tools": null}, {"text": "2b", "images": [], "messages": [], "tools": null}], "scores": [], "ranks": null, "prob": null, "weight": null, "margin": null, "provenance": [], "prompts": null, "prefix": null, "extras": [], "where": ""}', 'ordinary', NULL, NULL, 1, 1, 1, 1806503510018, 646787171, 1);
INSERT INTO item VALUES (4, 1, 1, 'row-3', 'a4e6b1e703c87309a098b9a8e9fa93944feed0b84b622ccc46576d4292a523c6', 2, '{"id": "row-3", "prompt": {"text": "question 3", "images": [], "messages": [], "tools": null}, "candidates": [{"text": "3a", "images": [], "messages": [], "tools": null}, {"text": "3b", "images": [], "messages": [], "tools": null}], "scores": [], "ranks": null, "prob": null, "weight": null, "margin": null, "provenance": [], "prompts": null, "prefix": null, "extras": [], "where": ""}', 'ordinary', NULL, NULL, 1, 0, 1, 2013718904835, 2098278911, 0);
INSERT INTO item VALUES (1, 1, 1, 'row-0', '12598370197d4b6f13e5f20a255189caabb165959802856febfd5a3b7b4644aa', 2, '{"id": "row-0", "prompt": {"text": "question 0", "images": [], "messages": [], "tools": null}, "candidates": [{"text": "0a", "images": [], "messages": [], "tools": null}, {"text": "0b", "images": [], "messages": [], "tools": null}], "scores": [], "ranks": null, "prob": null, "weight": null, "margin": null, "provenance": [], "prompts": null, "prefix": null, "extras": [], "where": ""}', 'ordinary', NULL, NULL, 1, 0, 1, 2137585090560, 409983075, 0);
INSERT INTO participation VALUES (1, 1, 2013718904835, 0, 4, 3, 0, 0, 0, 0, NULL, NULL, 1000);
INSERT INTO project VALUES (1, 'old', 'text', '{"aspects": [], "calibration": 0, "choices": ["left", "right", "tie", "both_bad", "skip"], "flags": [], "gold_share": 0.0, "guideline": "", "lease_minutes": 15.0, "min_dwell_ms": 0, "order": "random", "overlap_share": 0.0, "overlap_votes": 3, "random_share": 0.0, "rationale": "optional", "repeat_gap": 20, "repeat_share": 0.0, "strength": false, "votes_per_item": 1}', 1, true, 'eb8e5f0171221ecbb8a9968ed41b7eca', 1, 1, 4, 4, 2, 1000);
INSERT INTO schema_version VALUES (1, 1795348152.575371);
INSERT INTO source VALUES (1, 1, 1, '', 1000);
INSERT INTO vote VALUES (1, '_QSJugV59DYD6MV-fkw9Vw', 1, 1, '{"aspects": {}, "choice": "b", "flags": {}, "ranks": null, "rationale": "", "strength": null}', '{"aspects": {}, "choice": "left", "flags": {}, "ranks": null, "rationale": "", "strength": null}', false, false, NULL, 1000, 1001, 1, '');
INSERT INTO vote VALUES (2, 'gDr6Q7_2Kqvni3tx6eMIYA', 1, 1, '{"aspects": {}, "choice": "skip", "flags": {}, "ranks": null, "rationale": "", "strength": null}', '{"aspects": {}, "choice": "skip", "flags": {}, "ranks": null, "rationale": "", "strength": null}', false, false, NULL, 1001, 1002, 1, '');
INSERT INTO vote VALUES (3, '4QfTCfW4ODtwnXpWhY6Qww', 1, 1, '{"aspects": {}, "choice": "a", "flags": {}, "ranks": null, "rationale": "", "strength": null}', '{"aspects": {}, "choice": "right", "flags": {}, "ranks": null, "rationale": "", "strength": null}', false, false, NULL, 1002, 1003, 1, '');
INSERT INTO vote VALUES (4, '4QfTCfW4ODtwnXpWhY6Qww', 2, 1, '{"aspects": {}, "choice": "tie", "flags": {}, "ranks": null, "rationale": "", "strength": null}', '{"aspects": {}, "choice": "tie", "flags": {}, "ranks": null, "rationale": "", "strength": null}', false, false, NULL, 1003, 1004, 1, '');
SELECT pg_catalog.setval('annotator_id_seq', 1, true);
SELECT pg_catalog.setval('event_id_seq', 18, true);
SELECT pg_catalog.setval('item_id_seq', 4, true);
SELECT pg_catalog.setval('project_id_seq', 1, true);
SELECT pg_catalog.setval('schema_version_version_seq', 1, false);
SELECT pg_catalog.setval('source_id_seq', 1, true);
SELECT pg_catalog.setval('vote_id_seq', 4, true);
ALTER TABLE ONLY annotator
    ADD CONSTRAINT annotator_folded_key UNIQUE (folded);
ALTER TABLE ONLY annotator
    ADD CONSTRAINT annotator_pkey PRIMARY KEY (id);
ALTER TABLE ONLY assignment
    ADD CONSTRAINT assignment_pkey PRIMARY KEY (id);
ALTER TABLE ONLY blob
    ADD CONSTRAINT blob_pkey PRIMARY KEY (media);
ALTER TABLE ONLY event
    ADD CONSTRAINT event_pkey PRIMARY KEY (id);
ALTER TABLE ONLY guideline
    ADD CONSTRAINT guideline_pkey PRIMARY KEY (project, version);
ALTER TABLE ONLY item
    ADD CONSTRAINT item_pkey PRIMARY KEY (id);
ALTER TABLE ONLY item
    ADD CONSTRAINT item_project_content_hash_key UNIQUE (project, content_hash);
ALTER TABLE ONLY media
    ADD CONSTRAINT media_pkey PRIMARY KEY (key);
ALTER TABLE ONLY media
    ADD CONSTRAINT media_project_sha256_key UNIQUE (project, sha256);
ALTER TABLE ONLY participation
    ADD CONSTRAINT participation_pkey PRIMARY KEY (project, annotator);
ALTER TABLE ONLY project
    ADD CONSTRAINT project_name_key UNIQUE (name);
ALTER TABLE ONLY project
    ADD CONSTRAINT project_pkey PRIMARY KEY (id);
ALTER TABLE ONLY schema_version
    ADD CONSTRAINT schema_version_pkey PRIMARY KEY (version);
ALTER TABLE ONLY session
    ADD CONSTRAINT session_pkey PRIMARY KEY (token);
ALTER TABLE ONLY source
    ADD CONSTRAINT source_pkey PRIMARY KEY (id);
ALTER TABLE ONLY throttle
    ADD CONSTRAINT throttle_pkey PRIMARY KEY (subject);
ALTER TABLE ONLY vote
    ADD CONSTRAINT vote_assignment_revision_key UNIQUE (assignment, revision);
ALTER TABLE ONLY vote
    ADD CONSTRAINT vote_pkey PRIMARY KEY (id);
CREATE INDEX assignment_leased ON assignment USING btree (project, expires_at) WHERE ((state)::text = 'leased'::text);
CREATE UNIQUE INDEX assignment_mine ON assignment USING btree (project, annotator, number);
CREATE UNIQUE INDEX assignment_once ON assignment USING btree (item, annotator) WHERE (repeats IS NULL);
CREATE INDEX assignment_open ON assignment USING btree (annotator, project) WHERE ((state)::text = 'leased'::text);
CREATE UNIQUE INDEX assignment_repeat ON assignment USING btree (repeats);
CREATE INDEX assignment_voted ON assignment USING btree (project, annotator, vote_number);
CREATE INDEX item_comparison ON item USING btree (project, comparison);
CREATE INDEX item_free ON item USING btree (project, "position") WHERE (slots_left > 0);
CREATE INDEX item_freed ON item USING btree (project, freed) WHERE (slots_left > 0);
CREATE INDEX item_known ON item USING btree (project, role, shuffle) WHERE ((role)::text <> 'ordinary'::text);
CREATE INDEX item_prioritised ON item USING btree (project, priority) WHERE ((slots_left > 0) AND (priority IS NOT NULL));
CREATE INDEX ix_event_project ON event USING btree (project);
CREATE INDEX ix_session_annotator ON session USING btree (annotator);
CREATE INDEX vote_project ON vote USING btree (project, id);
CREATE TRIGGER event_no_delete BEFORE DELETE ON event FOR EACH ROW EXECUTE FUNCTION mmalign_append_only();
CREATE TRIGGER event_no_update BEFORE UPDATE ON event FOR EACH ROW EXECUTE FUNCTION mmalign_append_only();
CREATE TRIGGER vote_no_delete BEFORE DELETE ON vote FOR EACH ROW EXECUTE FUNCTION mmalign_append_only();
CREATE TRIGGER vote_no_update BEFORE UPDATE ON vote FOR EACH ROW EXECUTE FUNCTION mmalign_append_only();
ALTER TABLE ONLY assignment
    ADD CONSTRAINT assignment_annotator_fkey FOREIGN KEY (annotator) REFERENCES annotator(id);
ALTER TABLE ONLY assignment
    ADD CONSTRAINT assignment_item_fkey FOREIGN KEY (item) REFERENCES item(id);
ALTER TABLE ONLY assignment
    ADD CONSTRAINT assignment_project_fkey FOREIGN KEY (project) REFERENCES project(id);
ALTER TABLE ONLY assignment
    ADD CONSTRAINT assignment_repeats_fkey FOREIGN KEY (repeats) REFERENCES assignment(id);
ALTER TABLE ONLY blob
    ADD CONSTRAINT blob_media_fkey FOREIGN KEY (media) REFERENCES media(key);
ALTER TABLE ONLY guideline
    ADD CONSTRAINT guideline_project_fkey FOREIGN KEY (project) REFERENCES project(id);
ALTER TABLE ONLY item
    ADD CONSTRAINT item_project_fkey FOREIGN KEY (project) REFERENCES project(id);
ALTER TABLE ONLY item
    ADD CONSTRAINT item_source_fkey FOREIGN KEY (source) REFERENCES source(id);
ALTER TABLE ONLY media
    ADD CONSTRAINT media_project_fkey FOREIGN KEY (project) REFERENCES project(id);
ALTER TABLE ONLY participation
    ADD CONSTRAINT participation_annotator_fkey FOREIGN KEY (annotator) REFERENCES annotator(id);
ALTER TABLE ONLY participation
    ADD CONSTRAINT participation_project_fkey FOREIGN KEY (project) REFERENCES project(id);
ALTER TABLE ONLY session
    ADD CONSTRAINT session_annotator_fkey FOREIGN KEY (annotator) REFERENCES annotator(id);
ALTER TABLE ONLY source
    ADD CONSTRAINT source_project_fkey FOREIGN KEY (project) REFERENCES project(id);
ALTER TABLE ONLY vote
    ADD CONSTRAINT vote_assignment_fkey FOREIGN KEY (assignment) REFERENCES assignment(id);
ALTER TABLE ONLY vote
    ADD CONSTRAINT vote_project_fkey FOREIGN KEY (project) REFERENCES project(id);
