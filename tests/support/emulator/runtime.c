/* Stands in for CuTe DSL's runtime library: a kernel's host code, linked to this, launches into a callback. */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef struct { uint32_t x, y, z; } Dim3;
typedef struct { uint32_t id; uint32_t pad; uint8_t value[64]; } Attribute;
typedef struct { Dim3 grid, block; size_t dynamic_shared; void *stream; Attribute *attributes; uint32_t count; } Config;
typedef struct { uint32_t grid[3], block[3], cluster[3]; uint64_t dynamic_shared; } Launch;

static int (*launch)(const char *name, const Launch *launch, void **parameters);

void emulator_set_launch(int (*callback)(const char *, const Launch *, void **)) { launch = callback; }

int _cudaLaunchKernelEx(const Config *config, const void *kernel, void **parameters) {
  Launch l = {{config->grid.x, config->grid.y, config->grid.z},
              {config->block.x, config->block.y, config->block.z}, {1, 1, 1}, config->dynamic_shared};
  for (uint32_t i = 0; i < config->count; i++)
    if (config->attributes[i].id == 4) memcpy(l.cluster, config->attributes[i].value, 12);
  return launch((const char *)kernel, &l, parameters);
}

int _cudaLibraryLoadData(void **library, const void *code) { *library = (void *)code; return 0; }
int _cudaLibraryGetKernel(void **kernel, void *library, const char *name) {
  static char names[64][1024];
  static int used;
  for (int i = 0; i < used; i++)
    if (!strcmp(names[i], name)) { *kernel = names[i]; return 0; }
  strncpy(names[used], name, sizeof names[0] - 1);
  *kernel = names[used++];
  return 0;
}
int _cudaGetDevice(int *device) { *device = 0; return 0; }
int _cudaSetDevice(int device) { return 0; }
int _cudaDeviceGetAttribute(int *value, int attribute, int device) { *value = 232448; return 0; }
int _cuKernelGetAttribute(int *value, int attribute, void *kernel, int device) { *value = 0; return 0; }
int _cudaFuncSetAttribute(const void *kernel, int attribute, int value) { return 0; }
int _cudaKernelSetAttributeForDevice(void *kernel, int attribute, int value, int device) { return 0; }
void CuteDSLRT_TVMFFISetRaisedCudaError(int error) {}
void CuteDSLRT_TVMFFISetRaisedCudaLaunchError(int error) {}

int cuda_dialect_init_library_once(void **library, int (*init)(void **), int (*load)(void **, int), void *error) {
  void *handle = NULL;
  if (*library) return 0;
  int status = init(&handle);
  if (!status && load) status = load(&handle, 0);
  if (!status) *library = handle;
  return status;
}
void cuda_dialect_unload_library_once(void **library) {}
