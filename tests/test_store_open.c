/* test_store_open.c - creating, finding and opening stores. */
#include "store_fixture.h"

#include <store_internal.h>

#include <sys/stat.h>
#include <unistd.h>

static const cairn_geometry tiny = {
    .layers = 3, .first_layer = 1, .kv_heads = 2, .head_dim = 8, .block_tokens = 5, .dtype = CAIRN_F16};
static const cairn_geometry usual = {
    .layers = 2, .first_layer = 0, .kv_heads = 2, .head_dim = 64, .block_tokens = 63, .dtype = CAIRN_F16};

static int setup_tiny(void **state)
{
    *state = fixture_new(tiny);
    return 0;
}
static int teardown(void **state)
{
    fixture_free(*state);
    return 0;
}

static cairn_status open_as(const char *path, bool create, bool read_only, const cairn_geometry *geometry,
                            cairn_store **out)
{
    cairn_store_options opt;
    cairn_store_options_init(&opt, sizeof opt);
    opt.create = create;
    opt.read_only = read_only;
    opt.map_bytes = (uint64_t)1 << 30;
    if (geometry != NULL) opt.geometry = *geometry;
    return cairn_store_open(path, &opt, out);
}

static void assert_says(const char *words)
{
    if (strstr(cairn_last_error(), words) == NULL) fail_msg("'%s' does not say '%s'", cairn_last_error(), words);
}

static cairn_store_stat stat_of(cairn_store *store)
{
    cairn_store_stat st;
    assert_ok(cairn_store_stat_get(store, &st));
    return st;
}

static void print_damage(void *arg, const char *sentence)
{
    (void)arg;
    print_error("damage: %s\n", sentence);
}

static void assert_sound(cairn_store *store)
{
    cairn_verify_report report;
    assert_ok(cairn_store_verify(store, true, print_damage, NULL, NULL, &report));
    assert_ok(cairn_store_verify(store, false, print_damage, NULL, NULL, &report));
}

static unsigned mode_of(const char *dir, const char *name)
{
    struct stat st;
    char *path = test_path(dir, name);
    assert_int_equal(stat(path, &st), 0);
    free(path);
    return st.st_mode & 0777;
}

static void a_store_is_made_with_mode_0700_and_0600_whatever_the_umask(void **state)
{
    static const mode_t masks[] = {0, 022, 0777};
    (void)state;
    for (size_t i = 0; i < sizeof masks / sizeof *masks; i++) {
        char *dir = test_make_dir(), *path = test_path(dir, "store");
        cairn_store *store;
        mode_t old = umask(masks[i]);
        assert_ok(open_as(path, true, false, &tiny, &store));
        umask(old);
        assert_int_equal(mode_of(dir, "store"), 0700);
        assert_int_equal(mode_of(path, "data-1"), 0700);
        assert_int_equal(mode_of(path, "index"), 0700);
        assert_int_equal(mode_of(path, "lease"), 0700);
        assert_int_equal(mode_of(path, "current"), 0600);
        assert_int_equal(mode_of(path, "lock"), 0600);
        assert_int_equal(mode_of(path, "data-1/data.mdb"), 0600);
        assert_int_equal(mode_of(path, "data-1/lock.mdb"), 0600);
        cairn_store_close(store);
        free(path);
        test_remove_dir(dir);
    }
}

static void a_store_remembers_its_geometry_model_and_uuid(void **state)
{
    (void)state;
    char *dir = test_make_dir(), *path = test_path(dir, "store");
    cairn_store *store;
    cairn_store_options opt;
    cairn_store_options_init(&opt, sizeof opt);
    opt.create = true;
    opt.geometry = usual;
    opt.model = (cairn_model_id){.fingerprint = 0xfeedface, .name = "tiny stories"};
    assert_ok(cairn_store_open(path, &opt, &store));
    cairn_store_stat st = stat_of(store);
    assert_int_equal(strlen(st.uuid), 36);
    cairn_store_close(store);
    assert_ok(cairn_store_open(path, NULL, &store));
    assert_memory_equal(cairn_store_geometry(store), &usual, sizeof usual);
    assert_string_equal(cairn_store_model(store)->name, "tiny stories");
    assert_int_equal(cairn_store_model(store)->fingerprint, 0xfeedface);
    assert_string_equal(stat_of(store).uuid, st.uuid);
    assert_int_equal(stat_of(store).contexts, 0);
    cairn_store_close(store);
    free(path);
    test_remove_dir(dir);
}

static void a_store_of_another_geometry_or_model_is_a_mismatch_that_names_both(void **state)
{
    fixture *fx = *state;
    cairn_store *store;
    cairn_store_options opt;
    cairn_store_options_init(&opt, sizeof opt);
    opt.geometry = tiny;
    opt.geometry.head_dim = 16;
    assert_int_equal(cairn_store_open(fx->path, &opt, &store), CAIRN_MISMATCH);
    assert_null(store);
    assert_says("head dim 8");
    assert_says("head dim 16");
    cairn_store_close(fx->store); /* and the same when nobody has it open */
    fx->store = NULL;
    assert_int_equal(cairn_store_open(fx->path, &opt, &store), CAIRN_MISMATCH);
    opt.geometry = tiny;
    opt.model = (cairn_model_id){.fingerprint = 7, .name = "other"};
    assert_int_equal(cairn_store_open(fx->path, &opt, &store), CAIRN_MISMATCH);
    assert_says("'fixture'");
    assert_says("'other'");
    opt.model.fingerprint = 0x1234;
    assert_ok(cairn_store_open(fx->path, &opt, &fx->store));
}

static void what_is_no_store_is_not_found_and_is_left_alone(void **state)
{
    (void)state;
    char *dir = test_make_dir(), *path = test_path(dir, "x"), *inside = test_path(path, "letter.txt");
    cairn_store *store;
    assert_int_equal(open_as(path, false, false, NULL, &store), CAIRN_NOT_FOUND);
    assert_int_equal(open_as(path, true, true, &tiny, &store), CAIRN_NOT_FOUND);
    assert_int_equal(access(path, F_OK), -1);
    assert_int_equal(open_as(path, true, false, NULL, &store), CAIRN_INVALID); /* no geometry to create it with */
    assert_int_equal(access(path, F_OK), -1);
    test_write_file(path, "text", 4);
    assert_int_equal(open_as(path, true, false, &tiny, &store), CAIRN_INVALID);
    assert_int_equal(unlink(path), 0);
    assert_int_equal(mkdir(path, 0700), 0);
    assert_int_equal(open_as(path, false, false, NULL, &store), CAIRN_NOT_FOUND);
    test_write_file(inside, "text", 4);
    assert_int_equal(open_as(path, false, false, NULL, &store), CAIRN_NOT_FOUND);
    assert_int_equal(open_as(path, true, false, &tiny, &store), CAIRN_INVALID);
    assert_says("letter.txt");
    char *lock = test_path(path, "lock");
    assert_int_equal(access(lock, F_OK), -1);
    assert_int_equal(unlink(inside), 0);
    assert_ok(open_as(path, true, false, &tiny, &store)); /* an empty directory will do */
    cairn_store_close(store);
    free(lock);
    free(inside);
    free(path);
    test_remove_dir(dir);
}

static void geometry_out_of_bounds_is_refused_with_the_number(void **state)
{
    (void)state;
    static const struct {
        cairn_geometry geometry;
        const char *says;
    } cases[] = {{{5000, 0, 1, 2, 1, CAIRN_F32}, "5000 layers"},   {{2, 2, 1, 2, 1, CAIRN_F32}, "is 2 of 2"},
                 {{2, 0, 2000, 2, 1, CAIRN_F32}, "2000 KV"},       {{2, 0, 1, 7, 1, CAIRN_F32}, "head dim 7"},
                 {{2, 0, 1, 8, 5000, CAIRN_F32}, "5000 tokens"},   {{2, 0, 1, 8, 8, (cairn_dtype)9}, "type 9"},
                 {{2, 0, 1, 8, 0, CAIRN_F32}, "0 tokens"},         {{2, 0, 0, 8, 8, CAIRN_F32}, "0 KV"},
                 {{4096, 0, 1024, 1024, 1, CAIRN_F32}, "landmark"}};
    char *dir = test_make_dir(), *path = test_path(dir, "x");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        cairn_store *store;
        assert_int_equal(open_as(path, true, false, &cases[i].geometry, &store), CAIRN_INVALID);
        assert_says(cases[i].says);
    }
    free(path);
    test_remove_dir(dir);
}

static void a_process_opens_a_store_once_however_often_it_asks(void **state)
{
    fixture *fx = *state;
    cairn_store *again, *reader;
    char *other = test_path(fx->path, "../store/.");
    uint64_t id;
    assert_ok(cairn_store_open(other, NULL, &again));
    assert_ptr_equal(again->env, fx->store->env);
    assert_ok(open_as(fx->path, false, true, NULL, &reader));
    assert_ptr_equal(reader->env, fx->store->env);
    assert_int_equal(cairn_context_create(reader, "no", &id), CAIRN_INVALID);
    assert_says("read-only");
    assert_ok(cairn_context_create(again, "yes", &id));
    cairn_store_close(fx->store); /* the others go on */
    cairn_store_close(reader);
    assert_int_equal(stat_of(again).contexts, 1);
    cairn_store_close(again);
    assert_ok(open_as(fx->path, false, true, NULL, &reader));
    assert_int_equal(open_as(fx->path, false, false, NULL, &again), CAIRN_BUSY); /* cannot be widened to writing */
    cairn_store_close(reader);
    assert_ok(open_as(fx->path, false, false, NULL, &fx->store));
    free(other);
}

static void an_older_callers_shorter_options_are_understood(void **state)
{
    fixture *fx = *state;
    _Alignas(8) uint8_t room[sizeof(cairn_store_options)];
    memset(room, 0xee, sizeof room);
    size_t older = offsetof(cairn_store_options, create);
    cairn_store_options *opt = (void *)room;
    cairn_store *store;
    cairn_store_options_init(opt, older);
    for (size_t i = older; i < sizeof room; i++) assert_int_equal(room[i], 0xee);
    opt->read_only = true;
    assert_ok(cairn_store_open(fx->path, opt, &store));
    assert_true(store->read_only);
    cairn_store_close(store);
    opt->struct_size = 0;
    assert_int_equal(cairn_store_open(fx->path, opt, &store), CAIRN_INVALID);
}

static void a_half_made_store_is_not_mistaken_for_one_and_create_finishes_it(void **state)
{
    fixture *fx = *state;
    cairn_store *store;
    char *current = test_path(fx->path, "current"), *data = test_path(fx->path, "data-1/data.mdb");
    cairn_store_close(fx->store);
    fx->store = NULL;
    assert_int_equal(unlink(current), 0);          /* a creation killed before the pointer, */
    assert_int_equal(truncate(data, 4096 + 7), 0); /* in the middle of the data */
    assert_int_equal(open_as(fx->path, false, false, NULL, &store), CAIRN_NOT_FOUND);
    assert_says("not finished");
    fixture_open(fx, false);
    assert_int_equal(stat_of(fx->store).contexts, 0);
    assert_sound(fx->store);
    free(current);
    free(data);
}

static void a_pointer_file_that_names_no_data_directory_is_corrupt(void **state)
{
    fixture *fx = *state;
    static const char *const texts[] = {"",          "data-1",   "data-1\n\n", "data-01\n", "data-0\n",
                                        "data--1\n", "../etc\n", "data-1\0\n", "data-9\n",  "data-99999999999\n"};
    static const size_t sizes[] = {0, 6, 8, 8, 7, 8, 7, 8, 7, 17};
    char *current = test_path(fx->path, "current");
    cairn_store_close(fx->store);
    fx->store = NULL;
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        cairn_store *store;
        test_write_file(current, texts[i], sizes[i]);
        assert_int_equal(open_as(fx->path, false, true, NULL, &store), CAIRN_CORRUPT);
    }
    free(current);
}

static void a_damaged_or_lost_pointer_never_costs_the_data(void **state)
{
    fixture *fx = *state;
    char *current = test_path(fx->path, "current");
    cairn_store *store;
    uint64_t id;
    assert_ok(cairn_context_create(fx->store, "hours of work", &id));
    cairn_store_close(fx->store);
    fx->store = NULL;
    test_write_file(current, "data-3\n", 7); /* one bit */
    assert_int_equal(open_as(fx->path, false, false, NULL, &store), CAIRN_CORRUPT);
    assert_int_equal(unlink(current), 0);
    assert_int_equal(open_as(fx->path, true, false, &tiny, &store), CAIRN_CORRUPT);
    assert_says("data-1 holds 1 contexts");
    test_write_file(current, "data-1\n", 7);
    fixture_open(fx, false);
    assert_int_equal(stat_of(fx->store).contexts, 1);
    assert_sound(fx->store);
    free(current);
}

static void data_directories_the_pointer_does_not_name_are_removed_by_a_writing_open(void **state)
{
    fixture *fx = *state;
    char *left = test_path(fx->path, "data-7"), *file = test_path(left, "data.mdb");
    cairn_store *store;
    cairn_store_close(fx->store);
    fx->store = NULL;
    assert_int_equal(mkdir(left, 0700), 0);
    test_write_file(file, "half", 4);
    assert_ok(open_as(fx->path, false, true, NULL, &store));
    cairn_store_close(store);
    assert_int_equal(access(left, F_OK), 0);
    fixture_open(fx, false);
    assert_int_equal(access(left, F_OK), -1);
    free(file);
    free(left);
}

static void links_in_a_store_are_not_followed(void **state)
{
    fixture *fx = *state;
    char *precious = test_path(fx->dir, "precious"), *file = test_path(precious, "data.mdb");
    char *left = test_path(fx->path, "data-7"), *beside = test_path(fx->path, "current.new");
    char *index = test_path(fx->path, "index"), *lock = test_path(fx->path, "lock");
    cairn_store *store;
    cairn_store_close(fx->store);
    fx->store = NULL;
    assert_int_equal(mkdir(precious, 0700), 0);
    test_write_file(file, "precious", 8);
    assert_int_equal(chmod(file, 0644), 0);
    assert_int_equal(symlink(precious, left), 0); /* leftovers are removed: the link, not what it leads to */
    assert_int_equal(symlink(file, beside), 0);
    assert_ok(open_as(fx->path, false, false, NULL, &store));
    cairn_store_close(store);
    assert_int_equal(access(left, F_OK), -1);
    assert_int_equal(unlink(lock), 0);
    assert_int_equal(symlink(file, lock), 0);
    assert_int_not_equal(open_as(fx->path, false, false, NULL, &store), CAIRN_OK);
    assert_int_equal(unlink(lock), 0);
    assert_int_equal(rmdir(index), 0);
    assert_int_equal(symlink(precious, index), 0);
    assert_int_equal(open_as(fx->path, false, false, NULL, &store), CAIRN_CORRUPT);
    assert_says("index");
    assert_int_equal(unlink(index), 0);
    fixture_open(fx, false); /* and a copy that lost its empty directories is mended */
    assert_int_equal(mode_of(fx->path, "index"), 0700);
    assert_int_equal(mode_of(precious, "data.mdb"), 0644);
    size_t n;
    char *text = test_read_file(file, &n);
    assert_int_equal(n, 8);
    assert_memory_equal(text, "precious", 8);
    free(text);
    free(precious), free(file), free(left), free(beside), free(index), free(lock);
}

static void a_map_smaller_than_the_file_still_reads_all_of_it(void **state)
{
    fixture *fx = *state;
    cairn_store_options opt;
    cairn_writer *writer;
    cairn_snapshot *snap;
    fixture_context(fx, "a", 4, 300, 0);
    cairn_store_close(fx->store);
    cairn_store_options_init(&opt, sizeof opt);
    opt.map_bytes = 1 << 20;
    assert_ok(cairn_store_open(fx->path, &opt, &fx->store));
    assert_true(fx->store->env->data.map_bytes > 3 << 20);
    assert_ok(cairn_snapshot_begin(fx->store, &snap));
    fixture_check_blocks(fx, snap, "a", 4, 290, 10);
    cairn_snapshot_end(snap);
    assert_ok(cairn_writer_begin(fx->store, "a", &writer));
    static const uint8_t zeros[4096];
    static const cairn_token tokens[5];
    cairn_block_data blocks[64];
    for (int i = 0; i < 64; i++) blocks[i] = (cairn_block_data){tokens, zeros, zeros};
    assert_int_equal(cairn_writer_commit(writer, blocks, 64, NULL, 0, NULL), CAIRN_FULL);
    cairn_writer_end(writer);
    assert_sound(fx->store);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_store_is_made_with_mode_0700_and_0600_whatever_the_umask),
        cmocka_unit_test(a_store_remembers_its_geometry_model_and_uuid),
        cmocka_unit_test_setup_teardown(a_store_of_another_geometry_or_model_is_a_mismatch_that_names_both, setup_tiny,
                                        teardown),
        cmocka_unit_test(what_is_no_store_is_not_found_and_is_left_alone),
        cmocka_unit_test(geometry_out_of_bounds_is_refused_with_the_number),
        cmocka_unit_test_setup_teardown(a_process_opens_a_store_once_however_often_it_asks, setup_tiny, teardown),
        cmocka_unit_test_setup_teardown(an_older_callers_shorter_options_are_understood, setup_tiny, teardown),
        cmocka_unit_test_setup_teardown(a_half_made_store_is_not_mistaken_for_one_and_create_finishes_it, setup_tiny,
                                        teardown),
        cmocka_unit_test_setup_teardown(a_pointer_file_that_names_no_data_directory_is_corrupt, setup_tiny, teardown),
        cmocka_unit_test_setup_teardown(a_damaged_or_lost_pointer_never_costs_the_data, setup_tiny, teardown),
        cmocka_unit_test_setup_teardown(data_directories_the_pointer_does_not_name_are_removed_by_a_writing_open,
                                        setup_tiny, teardown),
        cmocka_unit_test_setup_teardown(links_in_a_store_are_not_followed, setup_tiny, teardown),
        cmocka_unit_test_setup_teardown(a_map_smaller_than_the_file_still_reads_all_of_it, setup_tiny, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
